"""Run by an interpreter with ArviZ 1.x and no torch: builds what it is given, opens what was written, makes the usual calls.

Arguments: the folder of the package, and a folder with ``*.pickle`` (contents for the builder) and ``*.nc`` (files of ArviZ 0.x).
Writes ``<name>_other.nc`` for every content, and prints what it found as JSON.
"""

import importlib
import json
import pickle
import sys
import types
import warnings
from pathlib import Path

# The package itself needs torch, which this interpreter has not: its numpy-only modules alone are loaded.
root, folder = sys.argv[1], Path(sys.argv[2])
for name, path in (("pyro_flowguides", root), ("pyro_flowguides.diagnostics", root + "/diagnostics")):
    package = types.ModuleType(name)
    package.__path__ = [path]
    sys.modules[name] = package
modules = ("arviz", "importance", "summary", "moments", "loo")
builder, importance, *_ = [importlib.import_module(f"pyro_flowguides.diagnostics.{name}") for name in modules]
assert "torch" not in sys.modules


def calls(tree, other):
    """The names of the usual calls, each made on a tree that has been read from a file."""
    import arviz as az

    def quietly(function, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one chain, and of short fits
            return function(*args, **kwargs)

    made = {
        "summary": lambda: quietly(az.summary, tree),
        "loo": lambda: quietly(az.loo, tree),
        "loo_approximate_posterior": lambda: quietly(
            az.loo_approximate_posterior, tree, tree.sample_stats["lp"], tree.sample_stats["log_q"]
        ),
        "compare": lambda: quietly(az.compare, {"one": tree, "other": other}),
        **{
            name: lambda name=name, options=options: quietly(getattr(az, name), tree, backend="none", **options)
            for name, options in (
                ("plot_trace", {}),
                ("plot_trace_dist", {}),
                ("plot_ppc_dist", {}),
                ("plot_forest", {}),
                ("plot_pair", {"var_names": ["mu", "tau"]}),
            )
        },
    }
    for call in made.values():
        call()
    return list(made)


def main():
    import numpy as np
    import xarray as xr

    found = {"generation": builder.arviz_generation(), "types": {}, "dims": {}, "calls": {}}
    for path in sorted(folder.glob("*.pickle")):
        groups, coords, attrs = pickle.loads(path.read_bytes())
        tree = builder.to_tree({name: builder.Group(*group) for name, group in groups.items()}, coords, attrs)
        found["types"][path.stem] = type(tree).__name__
        tree.to_netcdf(str(path.with_name(f"{path.stem}_other.nc")))
    files = [path for path in sorted(folder.glob("*.nc")) if "_other" not in path.stem and path.stem != "calibration"]
    trees = {path.stem: xr.open_datatree(path) for path in files}
    for name, tree in trees.items():
        found["dims"][name] = list(tree["posterior"]["theta"].dims)
        found["calls"][name] = calls(tree, next(iter(trees.values())))
    if (folder / "calibration.nc").exists():
        import arviz as az

        az.plot_ecdf_pit(xr.open_datatree(folder / "calibration.nc"), group="prior_vsbc", backend="none")
        found["calls"]["calibration"] = ["plot_ecdf_pit"]
    x = np.random.default_rng(0).normal(size=20_000)
    found["khat"] = float(importance.psis(-0.5 * x**2 / 4 + 0.5 * x**2)[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
