"""What the arguments of a model may be, at every entrance: converted to tensors, or refused with a sentence."""

import collections
import functools
import pickle

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick

import pyro_flowguides as fg
from pyro_flowguides.model.data import Conversion

VALUES = [[0.5, 1.0], [2.0, -1.0], [0.0, 3.0]]
FRAME = pd.DataFrame(VALUES, columns=["age", "income"])


def converted(value, model=None, owner="fit"):
    return Conversion(owner, model or (lambda y: None), (value,), {}).args[0]


Pair = collections.namedtuple("Pair", ["x", "n"])
TENSOR = torch.ones(2, dtype=torch.float64)
OBJECT = object()

TENSORS = {
    "float64 array": (np.array(VALUES), torch.tensor(VALUES)),
    "float16 array": (np.array(VALUES, dtype=np.float16), torch.tensor(VALUES)),
    "array with strides": (np.array(VALUES)[::-1, ::2], torch.tensor(VALUES)[[2, 1, 0]][:, :1]),
    "big-endian array": (np.array(VALUES, dtype=">f4"), torch.tensor(VALUES)),
    "array of one number": (np.array(3.5), torch.tensor(3.5)),
    "integer array": (np.arange(3, dtype=np.int32), torch.arange(3)),
    "unsigned array": (np.arange(3, dtype=np.uint8), torch.arange(3)),
    "bool array": (np.array([True, False]), torch.tensor([True, False])),
    "series": (pd.Series([1.5, 2.5], index=[7, 3]), torch.tensor([1.5, 2.5])),
    "series of floats with a gap": (pd.Series([1.5, None], dtype="Float64"), torch.tensor([1.5, torch.nan])),
    "series of integers": (pd.Series([1, 2]), torch.tensor([1, 2])),
    "nullable series": (pd.Series([1, 2], dtype="Int64"), torch.tensor([1, 2])),
    "nullable bools": (pd.Series([True, False], dtype="boolean"), torch.tensor([True, False])),
    "index": (pd.RangeIndex(3), torch.arange(3)),
    "frame": (FRAME, torch.tensor(VALUES)),
    "frame of integers": (
        pd.DataFrame({"a": [1, 2, 4], "b": [True, False, True]}),
        torch.tensor([[1.0, 1], [2, 0], [4, 1]]),
    ),
    "list": ([1.0, 2], torch.tensor([1.0, 2.0])),
    "list of integers": ([1, 2], torch.tensor([1, 2])),
    "list of scalars of numpy": ([np.float64(1.5), np.float32(2.5)], torch.tensor([1.5, 2.5])),
    "nested list": (VALUES, torch.tensor(VALUES)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_what_becomes_a_tensor(kind):
    given, expected = TENSORS[kind]
    made = converted(given)
    assert made.dtype == expected.dtype
    assert torch.equal(made.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_floats_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert converted(np.ones(2, dtype=np.float32)).dtype == torch.float64
        assert converted([1, 2]).dtype == torch.int64
    finally:
        torch.set_default_dtype(torch.float32)


KEPT = [
    3,
    2.5,
    True,
    None,
    "name",
    ("name", 32, 0.5),
    (32, 32),
    [],
    ["a", "b"],
    [TENSOR, TENSOR],
    {"n": 3},
    TENSOR,
    OBJECT,
]


@pytest.mark.parametrize("value", KEPT, ids=lambda value: str(type(value)))
def test_what_stays_what_it_is(value):
    assert converted(value) is value


def test_scalars_of_numpy_are_numbers():
    assert type(converted(np.float32(0.5))) is float and type(converted(np.int64(3))) is int


def test_entries_of_containers_are_converted():
    made = converted(
        {"y": [1.0, 2.0], "n": 3, "pair": Pair(np.arange(2), 5), "parts": [np.arange(2), pd.Series([0.5])]}
    )
    assert torch.equal(made["y"], torch.tensor([1.0, 2.0])) and made["n"] == 3
    assert torch.equal(made["pair"].x, torch.arange(2)) and made["pair"].n == 5
    assert torch.equal(made["parts"][1], torch.tensor([0.5]))
    columns = converted(dict(FRAME))
    assert list(columns) == ["age", "income"] and torch.equal(columns["age"], torch.tensor([0.5, 2.0, 0.0]))


def test_a_tensor_is_a_copy_on_the_device_of_the_others():
    array = np.zeros(2)
    made = converted(array)
    array[0] = 1.0
    assert made.tolist() == [0.0, 0.0]
    args = Conversion("fit", None, (torch.ones(1, device="meta"), np.ones(2)), {}).args
    assert args[1].device.type == "meta"


@pytest.mark.parametrize("annotation", [dict, "dict[str, torch.Tensor]", collections.abc.Mapping, "Optional[Mapping]"])
def test_a_frame_is_a_dict_where_the_model_asks_for_one(annotation):
    def model(data):
        pass

    model.__annotations__["data"] = annotation
    made = converted(FRAME, model)
    assert list(made) == ["age", "income"]
    mixed = converted(FRAME.assign(age=[1, 2, 3]), model)
    assert mixed["age"].dtype == torch.int64 and mixed["income"].dtype == torch.float32


REFUSED = {
    "array of objects": (np.array([1.0, "a"], dtype=object), r"holds objects \(object\).*astype\(float\)"),
    "array of strings": (np.array(["a", "b"]), "holds strings.*factorize"),
    "array of dates": (np.array(["2020-01-01"], dtype="datetime64[D]"), "holds dates.*Timedelta"),
    "complex array": (np.ones(2, dtype=complex), "holds complex numbers.*two arguments"),
    "masked array": (np.ma.masked_array([1.0, 2.0], mask=[True, False]), "masked array; fill it"),
    "huge integers": (np.array([2**63], dtype=np.uint64), "above 2.*as floats"),
    "strings": (pd.Series(["a", "b"]), "holds .*factorize|astype"),
    "strings of pandas": (pd.Series(["a", "b"], dtype="string"), "holds string.*factorize"),
    "dates": (pd.Series(pd.to_datetime(["2020-01-01"])), "holds dates.*Timedelta"),
    "dates with a zone": (pd.Series(pd.to_datetime(["2020-01-01"]).tz_localize("UTC")), "holds datetime64.*Timedelta"),
    "categories": (pd.Series(["a", "b"], dtype="category"), "holds categories.*cat.codes"),
    "integers with a gap": (pd.Series([1, None], dtype="Int64"), "Int64 with 1 missing values; drop or fill"),
    "bools with a gap": (pd.Series([True, None], dtype="boolean"), "boolean with 1 missing values"),
    "frame with strings": (FRAME.assign(name="a"), r"argument 'y\['name'\]' holds"),
    "frame without columns": (pd.DataFrame(index=[0, 1]), "frame without columns"),
    "ragged list": ([[1.0, 2.0], [3.0]], "different lengths; pad them"),
    "list with a gap": ([1.0, None], "list of numbers with a NoneType among them.*nan.*tuple"),
    "list with text": ([1.0, "a"], "with a str among them"),
    "ragged list in a dict": ({"y": [[1.0], [2.0, 3.0]]}, r"argument 'y\['y'\]' is a list of lists"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    value, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as error:
        converted(value)
    assert str(error.value).startswith("fit: argument 'y")


# --- entrances ---------------------------------------------------------------------------------------------------------


def regression(x, y, scale=1.0):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


X = [0.0, 1.0, 2.0, 3.0, 4.0]
WAYS = {
    "arrays": (np.array(X), np.array(Y)),
    "series": (pd.Series(X), pd.Series(Y, index=list("abcde"))),
    "lists": ([0, 1, 2, 3, 4], Y),
}


def guide():
    return fg.AutoPlanar(regression, num_layers=1)


def tensors():
    return torch.tensor(X), torch.tensor(Y)


ENTRANCES = {
    "fit": lambda *data: quick(regression, guide(), *data, num_steps=1, whiten=None).draws.log_p,
    "keywords": lambda x, y: (
        quick(regression, guide(), model_kwargs={"x": x, "y": y, "scale": 1.0}, num_steps=1, whiten=None).draws.log_p
    ),
    "restarts": lambda *data: quick(regression, guide(), *data, num_steps=1, whiten=None, num_restarts=2).draws.log_p,
    "batches": lambda *data: quick(regression, guide(), batches=[data, data], num_steps=2, whiten=None).draws.log_p,
    "draw": lambda *data: fg.draw(regression, guide(), *data, num_samples=3, seed=0).log_p,
    "whiten": lambda *data: guide().whiten(*data).fixed_map.scale,
    "setup": lambda *data: guide().setup(*data).fixed_map.loc,
    "to_arviz": lambda *data: torch.tensor(
        fg.to_arviz(guide(), *data, num_samples=30, seed=0).sample_stats["lp"].values
    ),
    "compare": lambda *data: torch.tensor(fg.compare({"a": guide()}, *data, num_samples=300, seed=0)["elbo"].values),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_sees_the_same_tensors(entrance):
    results = []
    for data in (tensors(), *(WAYS.values() if entrance == "draw" else [WAYS["arrays"]])):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(ENTRANCES[entrance](*data).double())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_refuses_with_a_sentence(entrance):
    with pytest.raises(ValueError, match="argument 'y' holds dates"):
        ENTRANCES[entrance](torch.tensor(X), pd.Series(pd.to_datetime(["2020-01-01"] * 5)))


def test_a_fit_keeps_the_tensors_and_pickles(tmp_path):
    path = tmp_path / "fit.ckpt"
    fit = quick(regression, guide(), *WAYS["series"], num_steps=4, checkpoint=path)
    again = pickle.loads(pickle.dumps(fit))
    assert torch.equal(again.args[1], torch.tensor(Y)) and again.args[1].dtype == torch.float32
    tensors = torch.tensor(X), torch.tensor(Y)
    resumed = quick(regression, guide(), *tensors, num_steps=4, checkpoint=fg.Checkpoint(path, resume=True))
    assert resumed.losses.tolist() == fit.losses.tolist()


def test_calibration_binds_arrays():
    def ranks(x):
        def infer(model, guide, seed):
            return fg.draw(model, guide, num_samples=9, seed=seed)

        make = functools.partial(functools.partial, regression, x, y=np.zeros(5))
        return fg.check_calibration(
            make, functools.partial(fg.AutoPlanar, num_layers=1), 20, infer=infer, num_samples=9, progress=False
        ).ranks["slope"]

    assert ranks(np.array(X)).tolist() == ranks(torch.tensor(X)).tolist()


def test_a_batch_may_be_a_frame():
    def model(data: dict):
        regression(data["x"], data["y"])

    frame = pd.DataFrame({"x": X, "y": Y})
    fit = quick(model, fg.AutoPlanar(model, num_layers=1), batches=[frame], num_steps=2)
    assert torch.equal(fit.draws.observed["y"], torch.tensor(Y))
    with pytest.raises(TypeError, match="give a list of frames"):
        quick(model, fg.AutoPlanar(model, num_layers=1), batches=frame)


def test_an_encoder_is_given_tensors():
    def model(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=data)

    guide = fg.AmortizedFlow(model, torch.nn.Linear(2, 3), flow=None)
    fit = quick(model, guide, np.array(VALUES), num_steps=2)
    median = fit.guide.median(pd.DataFrame(VALUES))["z"]
    torch.testing.assert_close(median, fit.guide.median(torch.tensor(VALUES))["z"])


# --- what the model makes of them --------------------------------------------------------------------------------------


def test_a_model_that_wants_columns_of_a_matrix():
    def model(data):
        regression(data["x"], data["y"])

    frame = pd.DataFrame({"x": X, "y": Y})
    for entrance in (
        lambda: quick(model, fg.AutoPlanar(model, num_layers=1), frame),
        lambda: fg.draw(model, fg.AutoPlanar(model, num_layers=1), frame),
        lambda: fg.AutoPlanar(model, num_layers=1).whiten(frame),
        lambda: quick(model, pyro.infer.autoguide.AutoNormal(model), frame),
    ):
        with pytest.raises(
            ValueError, match=r"'data' was a DataFrame and is a tensor of shape \(5, 2\).*dict\(frame\)"
        ):
            entrance()
    assert quick(model, fg.AutoPlanar(model, num_layers=1), dict(frame), num_steps=1).args[0]["x"].tolist() == X


def test_integers_where_the_model_multiplies_matrices():
    def model(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("mean", x @ beta)

    with pytest.raises(
        ValueError, match=r"'x' was a ndarray and is a tensor of shape \(3, 2\) and torch.int64.*astype\(float\)"
    ):
        quick(model, fg.AutoPlanar(model, num_layers=1), np.ones((3, 2), dtype=int))


def test_names_of_groups_in_a_list():
    def model(group):
        effect = pyro.sample("effect", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("mean", effect[tuple(group)])

    with pytest.raises(ValueError, match="'group' is a list of str and stays one"):
        quick(model, fg.AutoPlanar(model, num_layers=1), ["a", "b"])


def test_a_number_where_the_model_wants_a_tensor():
    def model(rate, n=3):
        pyro.sample("x", dist.Normal(rate.exp(), 1.0))

    with pytest.raises(ValueError, match=r"'rate' is the number 0.5 and stays one.*torch.tensor"):
        fg.draw(model, fg.AutoPlanar(model, num_layers=1), np.float64(0.5))


def test_an_error_of_the_model_itself_stays():
    def model(y):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        quick(model, fg.AutoPlanar(model, num_layers=1), torch.ones(2))
    with pytest.raises(RuntimeError, match="mine"):
        quick(model, fg.AutoPlanar(model, num_layers=1), 3)


def observing(distribution):
    def model(y):
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 3):
            pyro.sample("y", distribution(rate), obs=y)

    return model


COUNTS = np.array([0, 1, 1])


@pytest.mark.parametrize("family", [dist.Poisson, dist.Geometric, lambda rate: dist.Normal(rate, 1.0)])
def test_observed_integers_that_have_a_density(family):
    model = observing(family)
    counted, floats = (
        quick(model, fg.AutoPlanar(model, num_layers=1), y, num_steps=1, whiten=None).draws.log_p
        for y in (COUNTS, COUNTS * 1.0)
    )
    torch.testing.assert_close(counted, floats)


@pytest.mark.parametrize(
    ("values", "family", "message"),
    [
        (COUNTS, dist.Bernoulli, "torch.int64 values, and Bernoulli needs floats"),
        (COUNTS == 1, lambda rate: dist.Normal(rate, 1.0), "torch.bool values, and Normal needs floats"),
        (1, dist.Bernoulli, "observed at the number 1, which is no tensor"),
        (0.5, lambda rate: dist.Normal(rate, 1.0), "observed at the number 0.5"),
    ],
)
def test_observed_values_without_a_density(values, family, message):
    model = observing(family)
    for entrance in (
        lambda: quick(model, fg.AutoPlanar(model, num_layers=1), values),
        lambda: fg.draw(model, fg.AutoPlanar(model, num_layers=1), values),
        lambda: fg.AutoPlanar(model, num_layers=1).whiten(values),
    ):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=f"site 'y' is .*{message}"):
            entrance()


# --- labels ------------------------------------------------------------------------------------------------------------


def design(X, y):
    with pyro.plate("predictor", X.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(beta @ X.T, 1.0), obs=y)


def test_names_of_columns_are_labels_in_arviz():
    fit = quick(
        design, fg.AutoPlanar(design, num_layers=1), FRAME, pd.Series([0.1, 0.2, 0.3]), num_steps=1, whiten=None
    )
    for source in (fit, pickle.loads(pickle.dumps(fit))):
        tree = source.to_arviz(30, prior=False)
        assert tree.posterior["predictor"].values.tolist() == ["age", "income"]
        assert tree.observed_data["row"].values.tolist() == [0, 1, 2]
    given = fit.to_arviz(30, prior=False, coords={"predictor": ["a", "b"]})
    assert given.posterior["predictor"].values.tolist() == ["a", "b"]
    tree = fg.to_arviz(fit.guide, FRAME, [0.1, 0.2, 0.3], model=fit.model, num_samples=30)
    assert tree.posterior["predictor"].values.tolist() == ["age", "income"]


def test_columns_as_many_as_rows_are_no_labels():
    square = FRAME.iloc[:2]
    fit = quick(design, fg.AutoPlanar(design, num_layers=1), square, [0.1, 0.2], num_steps=1, whiten=None)
    tree = fit.to_arviz(30, prior=False)
    assert tree.posterior["predictor"].values.tolist() == [0, 1]
