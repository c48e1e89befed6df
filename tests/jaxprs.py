"""What a traced program computes."""

import jax


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def arrays(jaxpr):
    """Every value that a jaxpr, or one inside it, computes."""
    for equation in equations(jaxpr):
        yield from (variable.aval for variable in equation.outvars)
