"""Search spaces for ``python -m metamixer_ray.tune --space tune_spaces.mixing``, one per module; they can be joined.

Each has a function ``space()`` that returns a mapping of a training's own setting names to what is searched, in
HyperOpt's form; see :mod:`metamixer_ray.sweeps.spaces`.
"""
