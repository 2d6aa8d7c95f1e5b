"""A paired benchmark with an equivalence test: is a folded adapter as fast as a plain LoRA?"""
