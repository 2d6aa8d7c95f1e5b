"""The judge of vectors, classes and scores, with the standard library alone.

`reference` has what was recorded, `asking` speaks to servers, and `verdict` decides by the estimates of the room above.
"""
