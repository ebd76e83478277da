"""The fault matrix: real processes of ours, broken on purpose, and what must still be true after.

`make chaos`, or `python -m tests.chaos --only F1,F2`. See `__main__.py`.
"""
