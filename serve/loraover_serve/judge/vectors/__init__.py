"""The judge of vectors, classes and scores, with the standard library alone.

`reference` has the recorded answers, `asking` asks servers, and `verdict` decides by the estimates of the judge.
"""
