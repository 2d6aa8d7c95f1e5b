"""The judge inside a training loop that samples from an engine: does it sample from the policy that is trained?

This room imports the standard library and the judge's estimates alone. It reads logprobs of sampled tokens, which a
trainer has anyway, and asks the engine nothing. `trl.py` brings it into TRL's trainers, with
`sources.py` and `policy.py`, which need PyTorch.
"""
