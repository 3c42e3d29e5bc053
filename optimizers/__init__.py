"""Optimizers = gradient rule x base update, one file each.

A base (`sgd`, `adam`) says what is done with a gradient; a rule (`sam`) says at which weights the gradient
is taken. `sgd` alone takes the plain gradient; `sam-sgd` composes the two. In an entry function every
`per_model` setting arrives as a `[K, 1]` tensor, one row per model of the stack, so that formulas broadcast
against the stacked weights `[K, d]`.
"""
