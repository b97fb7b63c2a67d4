"""All models of the benchmark, by name."""

from . import discrete, hierarchies, likelihoods, regressions, series

PROBLEMS = {
    problem.name: problem
    for module in (regressions, hierarchies, series, likelihoods, discrete)
    for problem in module.PROBLEMS
}
