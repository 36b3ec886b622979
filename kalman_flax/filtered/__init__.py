"""The filter in the traced program of an unmodified Flax model.

    apply = kf.filtered(model.apply, input_states={1: kf.KalmanState(0.0, 1.0)})

`transform` traces the function, while `linen` (or `nnx`) puts a `marker` in the place
of every normaliser; `interpret` evaluates the program with a `belief` beside each
value, by the table in `rules`; `nested` and `control` do programs inside of it;
`kernels` maps the kernels; `explain` tells who got a prediction.
"""
