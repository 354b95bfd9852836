"""Models as torch modules: values, gradients, programs and files, against the textbook."""

import contextlib
import json
import os
import subprocess
import sys
import typing
import zipfile
from dataclasses import asdict

import numpy as np
import pytest

import oracle
from cases import LOG_PROB_TOLERANCE, PARAMETER_TOLERANCE, assert_close
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._files import with_arrays

torch = pytest.importorskip("torch")

from safetensors.torch import save as serialize  # noqa: E402 (needs torch)

import gaussmix.torch as gt  # noqa: E402

SIZES = [(1, 1, 1), (3, 1, 5), (1, 4, 3), (2, 2, 1), (5, 7, 13)]  # k, d, n


def parameters(covariance_type, k, d, seed=0):
    """Weights, means, covariances and their factors in float64."""
    rng = np.random.RandomState(seed)
    shape = COVARIANCES[covariance_type].shape(k, d)
    if covariance_type in ("full", "tied"):
        factor = rng.normal(size=shape) + 2 * np.eye(d)
        covariances = factor @ np.swapaxes(factor, -1, -2)
        upper = np.swapaxes(np.linalg.inv(np.linalg.cholesky(covariances)), -1, -2).copy()
    else:
        covariances = rng.uniform(0.5, 3, size=shape)
        upper = covariances**-0.5
    return rng.dirichlet(np.ones(k)), 3 * rng.normal(size=(k, d)), covariances, upper


def model_of(covariance_type, k, d, dtype="float64", seed=0):
    weights, means, _, upper = (a.astype(dtype) for a in parameters(covariance_type, k, d, seed))
    return gt.GaussianMixtureModel.of(weights, means, upper, covariance_type)


def sigmas(model):
    """The covariances of a model as matrices, by the textbook: (k, d, d)."""
    k, d = model.means.shape
    upper = model.precisions_cholesky.double().numpy()
    if model.config.covariance_type in ("full", "tied"):
        covariances = np.linalg.inv(upper @ np.swapaxes(upper, -1, -2))
    else:
        covariances = upper**-2.0
    return oracle.matrices(covariances, model.config.covariance_type, k, d)


def rows(n, d, dtype="float64", seed=1):
    return torch.from_numpy(3 * np.random.RandomState(seed).normal(size=(n, d))).to(getattr(torch, dtype))


class TestForward:
    @pytest.mark.parametrize(("k", "d", "n"), SIZES)
    def test_the_textbook(self, covariance, dtype, k, d, n):
        model, x = model_of(covariance.name, k, d, dtype), rows(n, d, dtype)
        log_responsibilities, log_prob = model(x)
        joint, evidence = oracle.evidence(x, model.component_probs.numpy(), model.means, sigmas(model))
        assert log_responsibilities.dtype == log_prob.dtype == x.dtype
        assert_close(log_prob, evidence, LOG_PROB_TOLERANCE[dtype], "log_prob")
        assert_close(log_responsibilities, joint - evidence[:, None], LOG_PROB_TOLERANCE[dtype], "log_responsibilities")

    def test_gradients(self, covariance):
        model = model_of(covariance.name, 3, 4)
        assert torch.autograd.gradcheck(model, (rows(5, 4).requires_grad_(),))

    def test_a_component_of_weight_zero(self, covariance):
        model = model_of(covariance.name, 3, 2)
        model.component_probs = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64)
        x = rows(4, 2).requires_grad_()
        log_responsibilities, log_prob = model(x)
        assert torch.all(log_responsibilities[:, 1] == -torch.inf)
        assert_close(log_responsibilities.exp().sum(dim=1).detach(), np.ones(4), 1e-12)
        (gradient,) = torch.autograd.grad(log_prob.sum(), x)
        assert torch.isfinite(gradient).all()

    def test_far_from_the_origin(self, covariance):
        near, far = model_of(covariance.name, 3, 2), model_of(covariance.name, 3, 2)
        far.means = near.means + 2.0**30
        x = (rows(6, 2) * 2**10).round() / 2**10
        near.means = (near.means * 2**10).round() / 2**10
        far.means = near.means + 2.0**30
        assert torch.equal(near(x)[1], far(x + 2.0**30)[1])

    def test_responsibilities_add_to_one_far_from_all_components(self, covariance):
        model = model_of(covariance.name, 3, 2)
        model.means, model.component_probs = 0 * model.means, torch.full((3,), 1 / 3, dtype=torch.float64)
        log_responsibilities, _ = model(1e8 * torch.ones(2, 2, dtype=torch.float64))
        assert_close(log_responsibilities.exp().sum(dim=1), np.ones(2), 1e-12)

    @pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4), (2, 5, 3)])
    def test_data_of_another_shape(self, shape):
        with pytest.raises(ValueError, match=r"data has shape .*; this model takes \(n, 3\)"):
            model_of("diag", 2, 3)(torch.zeros(shape, dtype=torch.float64))

    def test_data_of_another_dtype(self, covariance):
        with pytest.raises(TypeError, match=r"torch.float32 and the model torch.float64; convert one with \.to\(dtype"):
            model_of(covariance.name, 2, 3)(torch.zeros(2, 3))

    def test_moved(self, covariance):
        model, x = model_of(covariance.name, 3, 2, "float32"), rows(5, 2)
        assert model(x.float())[1].dtype == torch.float32
        assert_close(model.to(torch.float64)(x)[1], model_of(covariance.name, 3, 2)(x)[1], 1e-5)
        assert {buffer.device.type for buffer in model.to("meta").buffers()} == {"meta"}
        assert not list(model.parameters())


class TestPrograms:
    @pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
    def test_compiled_without_graph_breaks(self, covariance):
        torch.compiler.reset()
        model = model_of(covariance.name, 3, 2)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (2, 7):
            x = rows(n, 2).requires_grad_()
            found, expected = compiled(x), model(x)
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours.detach(), theirs.detach(), 1e-12)
            gradients = [torch.autograd.grad(sum((y * y).sum() for y in both), x)[0] for both in (found, expected)]
            assert_close(*gradients, 1e-12, "gradients")

    def test_compiling_warns_of_nothing(self):
        code = (
            f"import sys; sys.path[:0] = {sys.path!r}\n"
            "import torch, gaussmix.torch as gt\n"
            "model = gt.GaussianMixtureModel(gt.GaussianMixtureModelConfig(3, 2, 'full'))\n"
            "torch.compile(model, fullgraph=True, backend='eager')(torch.zeros(5, 2))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "Warning" not in done.stderr

    def test_exported_for_any_number_of_rows(self, covariance, dtype, tmp_path):
        model = model_of(covariance.name, 3, 2, dtype)
        model.save(tmp_path, compile_model=True)
        program = torch.export.load(tmp_path / "model.pt2").module()
        for n in (0, 1, 7):
            x = rows(n, 2, dtype)
            for found, expected in zip(program(x), model(x), strict=True):
                assert_close(found, expected, PARAMETER_TOLERANCE[dtype])
        model.save(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "parameters.safetensors"]

    def test_of_clusters(self, dtype, tmp_path):
        torch.compiler.reset()
        model = gt.KMeansModel.of(rows(3, 2, dtype))
        model.save(tmp_path, compile_model=True)
        exported = torch.export.load(tmp_path / "model.pt2").module()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for program in (exported, compiled):
            for n in (2, 7):
                x = rows(n, 2, dtype, seed=2)
                for found, expected in zip(program(x), model(x), strict=True):
                    assert_close(found, expected, PARAMETER_TOLERANCE[dtype])


class TestSample:
    def test_the_mixture_comes_out(self, covariance, dtype):
        model = model_of(covariance.name, 3, 2, dtype)
        n = 40_000
        model.component_probs = torch.tensor([0.2, 0.5, 0.3])
        drawn = model.sample(n, torch.Generator().manual_seed(0))
        assert drawn.shape == (n, 2)
        assert drawn.dtype == model.means.dtype
        counts = (n * model.component_probs.double()).numpy()
        start = 0
        for k, sigma in enumerate(sigmas(model)):
            # Well inside the group, whose size is random.
            group = drawn[int(start + 500) : int(start + counts[k] - 500)].double().numpy()
            start += counts[k]
            standardized = (group - model.means[k].double().numpy()) @ np.linalg.inv(np.linalg.cholesky(sigma)).T
            assert_close(standardized.mean(axis=0), np.zeros(2), 4 / len(group) ** 0.5, "mean")
            assert_close(np.cov(standardized.T), np.eye(2), 8 / len(group) ** 0.5, "covariance")

    def test_grouped_by_component_none_of_weight_zero(self, covariance):
        model = model_of(covariance.name, 4, 3, "float32")
        # Sums to 1 in float32 only roughly; components are far apart.
        model.component_probs = torch.tensor([0.3, 0.0, 0.3, 0.4000001])
        model.means = 1000 * torch.arange(4.0)[:, None].expand(4, 3)
        found = (model.sample(101)[:, 0] / 1000).round()
        assert found.tolist() == sorted(found.tolist())
        assert set(found.tolist()) == {0.0, 2.0, 3.0}

    def test_a_generator_and_nothing_else(self, covariance):
        model = model_of(covariance.name, 3, 2)
        state = torch.get_rng_state()
        first, second = (model.sample(7, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(3)
        assert torch.equal(model.sample(7), first)

    @pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
    def test_how_many(self, n, error):
        with pytest.raises(error, match="num_datapoints must be"):
            model_of("diag", 2, 2).sample(n)


class TestParameters:
    @pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
    @pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (1, 4), (5, 3), (2, 40)])
    def test_random_ones_are_valid(self, covariance, precision, k, d):
        torch.manual_seed(0)
        model = gt.GaussianMixtureModel(gt.GaussianMixtureModelConfig(k, d, covariance.name))
        model = model.to(getattr(torch, precision))
        before = model.means.clone()
        model.reset_parameters()
        assert not torch.equal(before, model.means)
        assert_close(model.component_probs.double().sum(), 1, 1e-6 if precision != "bfloat16" else 2e-2)
        assert torch.all(model.component_probs >= 0)
        upper = model.precisions_cholesky
        assert upper.shape == covariance.shape(k, d)
        if covariance.has_matrices:
            assert torch.equal(upper, upper.triu())
            upper = upper.diagonal(dim1=-2, dim2=-1)
        assert torch.all(upper > 0)

    def test_covariances(self, covariance, dtype):
        model = model_of(covariance.name, 3, 4, dtype)
        assert model.covariances.dtype == model.means.dtype
        assert_close(model.covariances, parameters(covariance.name, 3, 4)[2], PARAMETER_TOLERANCE[dtype])

    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            ((0, 2, "full"), ValueError, "num_components must be at least 1, got 0"),
            ((2, 0, "full"), ValueError, "num_features must be at least 1"),
            ((2, 2.0, "full"), TypeError, "num_features must be an integer"),
            ((2, 2, "round"), ValueError, r"covariance_type must be one of \['diag'.*got 'round'"),
        ],
    )
    def test_a_config_that_can_not_be(self, config, error, message):
        with pytest.raises(error, match=message):
            gt.GaussianMixtureModel(gt.GaussianMixtureModelConfig(*config))

    def test_a_clone_shares_nothing(self, covariance, dtype):
        model = model_of(covariance.name, 3, 2, dtype)
        same, other = model.clone(), model.clone(copy_parameters=False)
        for clone in (same, other):
            assert clone.config == model.config
            assert clone.means.dtype == model.means.dtype
        for name, buffer in model.named_buffers():
            assert torch.equal(same.get_buffer(name), buffer)
            assert not torch.equal(other.get_buffer(name), buffer)
            assert same.get_buffer(name).data_ptr() != buffer.data_ptr()


class TestOf:
    def test_arrays_of_any_library(self, library, covariance, dtype):
        arrays = [library.asarray(a, dtype) for a in parameters(covariance.name, 3, 2)]
        model = gt.GaussianMixtureModel.of(arrays[0], arrays[1], arrays[3], covariance.name)
        assert model.config == gt.GaussianMixtureModelConfig(3, 2, covariance.name)
        for buffer, array in zip(model.buffers(), (arrays[0], arrays[1], arrays[3]), strict=True):
            assert str(buffer.dtype) == f"torch.{dtype}"
            assert np.array_equal(buffer, to_numpy(array))

    def test_memory_is_shared(self):
        weights, means, _, upper = parameters("full", 2, 3)
        model = gt.GaussianMixtureModel.of(weights, torch.from_numpy(means), upper, "full")
        weights[0], means[1, 2], upper[0, 0, 0] = 7, 8, 9
        assert (model.component_probs[0], model.means[1, 2], model.precisions_cholesky[0, 0, 0]) == (7, 8, 9)

    def test_what_torch_has_no_tensors_for_is_copied(self):
        centroids = np.arange(6.0).reshape(3, 2)
        assert torch.equal(gt.KMeansModel.of(centroids[::-1]).centroids, torch.from_numpy(centroids).flip(0))
        centroids.flags.writeable = False
        assert np.array_equal(gt.KMeansModel.of(centroids).centroids, centroids)

    def test_lists_and_half_precision(self):
        assert gt.KMeansModel.of([[0], [1]]).centroids.dtype == torch.float64
        assert gt.KMeansModel.of(np.zeros((2, 1), np.float16)).centroids.dtype == torch.float32

    def test_shapes_that_do_not_fit(self, covariance):
        weights, means, _, upper = parameters(covariance.name, 3, 2)
        with pytest.raises(ValueError, match=r"means has shape \(6,\)"):
            gt.GaussianMixtureModel.of(weights, means.ravel(), upper, covariance.name)
        for wrong in ((weights[:2], upper), (weights, upper[None])):
            with pytest.raises(ValueError, match="the parameters have the shapes .* takes"):
                gt.GaussianMixtureModel.of(wrong[0], means, wrong[1], covariance.name)


@pytest.fixture
def saved(tmp_path):
    model_of("full", 3, 2).save(tmp_path)
    return tmp_path


class TestFiles:
    @pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
    def test_the_same_bits(self, covariance, precision, tmp_path):
        model = model_of(covariance.name, 3, 2).to(getattr(torch, precision))
        model.save(tmp_path / "a" / "b")
        loaded = gt.GaussianMixtureModel.load(str(tmp_path / "a" / "b"))
        assert loaded.config == model.config
        for name, buffer in model.named_buffers():
            assert loaded.get_buffer(name).dtype == buffer.dtype
            assert torch.equal(loaded.get_buffer(name), buffer)
        assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == {
            "num_components": 3,
            "num_features": 2,
            "covariance_type": covariance.name,
        }

    def test_views_of_one_array(self, tmp_path):
        both = (rows(2, 2).abs() + 1).tril()
        model = gt.GaussianMixtureModel.of([0.5, 0.5], both, both.T, "tied")
        model.save(tmp_path)
        assert torch.equal(gt.GaussianMixtureModel.load(tmp_path).precisions_cholesky, both.T)

    def test_clusters(self, dtype, tmp_path):
        model = gt.KMeansModel.of(rows(3, 2, dtype))
        model.save(tmp_path)
        assert torch.equal(gt.KMeansModel.load(tmp_path).centroids, model.centroids)

    def test_loading_draws_no_random_numbers(self, saved):
        state = torch.get_rng_state()
        gt.GaussianMixtureModel.load(saved)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("step", ["config.json", "parameters.safetensors"])
    def test_an_interrupted_save_leaves_a_whole_model(self, saved, monkeypatch, step):
        replace = os.replace

        def fail(source, target):
            if os.path.basename(target) == step:
                raise OSError("the disk is full")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk is full"):
            model_of("tied", 2, 2).save(saved)
        loaded = gt.GaussianMixtureModel.load(saved)
        expected = ("full", 3) if step == "parameters.safetensors" else ("tied", 2)
        assert (loaded.config.covariance_type, loaded.config.num_components) == expected
        assert sorted(os.listdir(saved)) == ["config.json", "parameters.safetensors"]

    def test_what_pycave_wrote(self, covariance, dtype, tmp_path):
        model = model_of(covariance.name, 3, 2, dtype)
        config = {"num_components": 3, "num_features": 2, "covariance_type": covariance.name}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(model.state_dict(), tmp_path / "parameters.pt")
        loaded = gt.GaussianMixtureModel.load(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))

    def test_nothing_there(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(FileNotFoundError, match="holds no saved model.*pass the directory"):
                gt.GaussianMixtureModel.load(path)
        with pytest.raises(NotADirectoryError, match="is a file"):
            model_of("diag", 1, 1).save(tmp_path / "config.json")

    def test_parameters_that_are_a_link_to_nothing(self, saved):
        torch.save(model_of("full", 3, 2).state_dict(), saved / "parameters.pt")  # which are not what was saved last
        (saved / "parameters.safetensors").unlink()
        (saved / "parameters.safetensors").symlink_to("nowhere")
        with pytest.raises(ValueError, match=r"parameters\.safetensors is damaged: it is no file, or a link"):
            gt.GaussianMixtureModel.load(saved)

    def test_weights_that_were_rounded(self, saved):
        """To half precision, and made float again."""
        model = gt.GaussianMixtureModel.of(np.full(200, 0.005), np.zeros((200, 1)), np.ones(200), "spherical")
        rounded = model.bfloat16().double()
        assert abs(rounded.component_probs.sum() - 1) > 1e-4
        rounded.save(saved)
        assert torch.equal(gt.GaussianMixtureModel.load(saved).component_probs, rounded.component_probs)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_truncated_file(self, saved, keep):
        path = saved / "parameters.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"parameters\.safetensors is damaged"):
            gt.GaussianMixtureModel.load(saved)

    def test_damaged_files_of_pycave(self, tmp_path):
        (tmp_path / "config.json").write_text('{"num_clusters": 3, "num_features": 2}')
        torch.save({"centroids": rows(3, 2)}, tmp_path / "parameters.pt")
        whole = (tmp_path / "parameters.pt").read_bytes()
        for keep in range(0, len(whole), 7):
            (tmp_path / "parameters.pt").write_bytes(whole[:keep])
            with pytest.raises(ValueError, match=r"parameters\.pt is damaged"):
                gt.KMeansModel.load(tmp_path)
        (tmp_path / "parameters.pt").write_bytes(whole)
        (tmp_path / "config.json").write_text('{"num_clusters": 3')
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            gt.KMeansModel.load(tmp_path)

    @pytest.mark.parametrize(
        ("config", "state"),
        [
            ('{"num_clusters": 2, "num_features": 2}', {"centroids": [[0.0, 0.0]]}),
            ('{"num_clusters": 1, "num_features": 2}', {"means": [[0.0, 0.0]]}),
            ('{"num_clusters": "1", "num_features": 2}', {"centroids": [[0.0, 0.0]]}),
            ('{"num_clusters": 1}', {"centroids": [[0.0, 0.0]]}),
            ("[1, 2]", {"centroids": [[0.0, 0.0]]}),
            ('{"num_clusters": 1, "num_features": 2}', None),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path, config, state):
        (tmp_path / "config.json").write_text(config)
        state = state and {name: torch.tensor(value) for name, value in state.items()}
        torch.save(state, tmp_path / "parameters.pt")
        with pytest.raises(ValueError, match="is damaged: it holds no KMeansModel"):
            gt.KMeansModel.load(tmp_path)

    @pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("component_probs", lambda x: -x),
            ("component_probs", lambda x: 2 * x),
            ("component_probs", lambda x: x.cfloat()),
            ("component_probs", lambda x: x[:2]),
            ("means", lambda x: x * torch.nan),
            ("means", lambda x: x / 0),
            ("means", lambda x: x.int()),
            ("means", lambda x: x[:, :1]),
            ("precisions_cholesky", lambda x: -x),
            ("precisions_cholesky", lambda x: 0 * x),
            ("precisions_cholesky", lambda x: x + torch.ones_like(x).tril(-1)),
            ("precisions_cholesky", lambda x: x * torch.inf),
        ],
    )
    def test_values_that_no_mixture_has(self, tmp_path, precision, name, change):
        """In a file of ours, whose digest is right, and in one of PyCave's."""
        model = model_of("full", 3, 2).to(getattr(torch, precision))
        config, buffers = asdict(model.config), {name: b.contiguous() for name, b in model.named_buffers()}
        bad = buffers | {name: change(buffers[name]).contiguous()}
        for folder in ("ours", "theirs"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text(json.dumps(config))
        for content, refused in ((buffers, False), (bad, True)):
            (tmp_path / "ours" / "parameters.safetensors").write_bytes(with_arrays(content, config, serialize))
            torch.save(content, tmp_path / "theirs" / "parameters.pt")
            for folder in ("ours", "theirs"):
                with pytest.raises(ValueError, match="is damaged") if refused else contextlib.nullcontext():
                    gt.GaussianMixtureModel.load(tmp_path / folder)

    def test_values_that_could_not_be_loaded_are_not_saved(self, tmp_path, covariance):
        model = model_of(covariance.name, 3, 2)
        for name in ("component_probs", "means", "precisions_cholesky"):
            bad = model.clone()
            bad.get_buffer(name).fill_(torch.nan)
            with pytest.raises(ValueError, match="contains NaN"):
                bad.save(tmp_path / "model")
        with pytest.raises(ValueError, match="contains NaN"):
            gt.KMeansModel.of([[np.nan]]).save(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize("left", [(), ("means",), ("means", "component_probs")])
    def test_buffers_that_are_missing(self, tmp_path, left):
        """A model without any would be drawn at random."""
        model = model_of("diag", 3, 2)
        config, buffers = asdict(model.config), {name: model.get_buffer(name).contiguous() for name in left}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(buffers, tmp_path / "parameters.pt")
        with pytest.raises(ValueError, match=r"it holds no GaussianMixtureModel \(.*'precisions_cholesky'.* not there"):
            gt.GaussianMixtureModel.load(tmp_path)
        (tmp_path / "parameters.safetensors").write_bytes(with_arrays(buffers, config, serialize))
        with pytest.raises(ValueError, match=r"it holds no GaussianMixtureModel \(.*'precisions_cholesky'.* not there"):
            gt.GaussianMixtureModel.load(tmp_path)
        (tmp_path / "parameters.safetensors").write_bytes(
            with_arrays({}, {"num_clusters": 3, "num_features": 2}, serialize)
        )
        with pytest.raises(ValueError, match=r"it holds no KMeansModel \(\['centroids'\] are not there"):
            gt.KMeansModel.load(tmp_path)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.eye(2).to_sparse(),
            torch.eye(2, dtype=torch.complex64),
            torch.eye(2, device="meta"),
            torch.eye(2).int(),
            torch.zeros(1).expand(2, 2),
            torch.nn.Parameter(torch.eye(2)),
            bytearray(10),
            [1.0],
        ],
        ids=lambda value: str(getattr(value, "layout", type(value)))[-12:],
    )
    def test_what_is_no_dense_tensor(self, tmp_path, tensor):
        (tmp_path / "config.json").write_text('{"num_clusters": 2, "num_features": 2}')
        torch.save({"centroids": tensor}, tmp_path / "parameters.pt")
        with pytest.raises(ValueError, match="is damaged"):
            gt.KMeansModel.load(tmp_path)

    @pytest.mark.parametrize("bomb", ["compressed", "too large", "repeated"])
    def test_files_that_unpack_to_more_than_the_tensors_take(self, tmp_path, bomb, monkeypatch):
        (tmp_path / "config.json").write_text('{"num_clusters": 2, "num_features": 2}')
        path = tmp_path / "parameters.pt"
        torch.save({"centroids": torch.zeros(2**24 if bomb == "too large" else 4)}, path)
        if bomb != "too large":
            with zipfile.ZipFile(path) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in entries.items():
                    archive.writestr(name, content if "/data/" not in name else bytes(2**24))
                if bomb == "repeated":  # one entry of the directory for the same bytes many times
                    archive.filelist *= 100
        monkeypatch.setattr(torch, "load", None)
        with pytest.raises(ValueError, match=r"parameters\.pt is damaged: .* \d+ bytes"):
            gt.KMeansModel.load(tmp_path)
        if bomb != "too large":  # nor does a config help that says so
            (tmp_path / "config.json").write_text('{"num_clusters": 1000000, "num_features": 1000000}')
            with pytest.raises(ValueError, match=r"it unpacks to \d+ bytes"):
                gt.KMeansModel.load(tmp_path)

    @pytest.mark.parametrize("value", [10**400, 10**15, -1, True, 2.0, "2", None, [2], {"a": 2}])
    def test_configs_of_no_size(self, tmp_path, value):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"num_clusters": value, "num_features": 2}))
        for content in ({"centroids": torch.zeros(2, 2)}, {}):
            torch.save(content, tmp_path / "parameters.pt")
            with pytest.raises(ValueError, match="is damaged"):
                gt.KMeansModel.load(tmp_path)
        path.write_text("[" * 100_000)
        with pytest.raises(ValueError, match=r"config\.json is damaged: it is nested too deeply"):
            gt.KMeansModel.load(tmp_path)

    def test_another_model(self, saved):
        with pytest.raises(ValueError, match="it holds no KMeansModel"):
            gt.KMeansModel.load(saved)


class TestGaussians:
    @pytest.mark.parametrize(("k", "d", "n"), SIZES)
    def test_densities_and_factors(self, covariance, dtype, k, d, n):
        name = covariance.name
        _, means, covariances, upper = parameters(name, k, d)
        means, covariances = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in (means, covariances))
        factors = gt.cholesky_precision(covariances, name)
        assert factors.dtype == means.dtype
        assert_close(factors, upper, PARAMETER_TOLERANCE[dtype], "factors")
        assert_close(gt.covariance(factors, name), covariances, PARAMETER_TOLERANCE[dtype], "covariances")
        x = rows(n, d, dtype)
        expected = oracle.log_prob(x, means, oracle.matrices(covariances, name, k, d))
        assert_close(gt.log_normal(x, means, factors, name), expected, LOG_PROB_TOLERANCE[dtype], "log_normal")
        assert gt.covariance_shape(k, d, name) == covariances.shape
        assert isinstance(gt.covariance_shape(k, d, name), torch.Size)
        assert gt.covariance_dim(name) == covariances.ndim

    def test_gradients_in_the_parameters(self, covariance):
        _, means, _, upper = parameters(covariance.name, 2, 3)
        means, upper = (torch.from_numpy(a).requires_grad_() for a in (means, upper))
        assert torch.autograd.gradcheck(
            lambda x, m, u: gt.log_normal(x, m, u, covariance.name), (rows(4, 3).requires_grad_(), means, upper)
        )

    def test_samples(self, covariance, dtype):
        _, means, covariances, upper = parameters(covariance.name, 1, 3)
        mean = torch.from_numpy(means[0]).to(getattr(torch, dtype))
        # A single component's factor, as PyCave takes it: without the axis of components.
        factor = torch.from_numpy(
            upper if covariance.shares_moments or covariance.name == "spherical" else upper[0]
        ).to(mean.dtype)
        torch.manual_seed(0)
        drawn = gt.sample_normal(20_000, mean, factor, covariance.name)
        assert drawn.dtype == mean.dtype
        (sigma,) = oracle.matrices(covariances, covariance.name, 1, 3)
        standardized = (drawn.double().numpy() - means[0]) @ np.linalg.inv(np.linalg.cholesky(sigma)).T
        assert_close(standardized.mean(axis=0), np.zeros(3), 0.03, "mean")
        assert_close(np.cov(standardized.T), np.eye(3), 0.06, "covariance")

    @pytest.mark.parametrize("caught", [torch.linalg.LinAlgError, np.linalg.LinAlgError, ValueError])
    def test_what_is_not_positive_definite(self, covariance, caught):
        covariances = torch.from_numpy(parameters(covariance.name, 3, 2)[2])
        covariances[-1] *= -1
        which = "that all components share" if covariance.shares_moments else "of component 2"
        with pytest.raises(caught, match=f"the covariance {which} is not positive definite; add a small positive"):
            gt.cholesky_precision(covariances, covariance.name)

    def test_the_names_of_the_types(self):
        assert set(typing.get_args(gt.CovarianceType)) == set(COVARIANCES)
        with pytest.raises(ValueError, match="covariance_type must be one of"):
            gt.covariance_shape(1, 1, "round")


class TestClusters:
    @pytest.mark.parametrize(("k", "d", "n"), SIZES)
    def test_distances(self, dtype, k, d, n):
        model, x = gt.KMeansModel.of(rows(k, d, dtype)), rows(n, d, dtype, seed=2)
        distances, assignments, inertias = model(x)
        offsets = x.double().numpy()[:, None] - model.centroids.double().numpy()
        expected = np.sqrt((offsets**2).sum(axis=2))
        assert distances.dtype == inertias.dtype == x.dtype
        assert_close(distances, expected, PARAMETER_TOLERANCE[dtype], "distances")
        assert assignments.tolist() == expected.argmin(axis=1).tolist()
        assert_close(inertias, expected.min(axis=1) ** 2, PARAMETER_TOLERANCE[dtype], "inertias")

    def test_many_rows_far_from_the_origin(self):
        x, centroids = (rows(n, 3).round() for n in (100, 50))
        near, far = gt.KMeansModel.of(centroids)(x), gt.KMeansModel.of(centroids + 2.0**40)(x + 2.0**40)
        assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))

    def test_the_first_of_equals(self):
        assert gt.KMeansModel.of([[1.0], [1.0], [3.0]])(torch.tensor([[1.0], [2.0]]).double())[1].tolist() == [0, 0]

    def test_gradients(self):
        model, x = gt.KMeansModel.of(rows(3, 2)), rows(5, 2, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: model(x)[::2], (x,))
        on_centroids = model.centroids.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(on_centroids)[2].sum(), on_centroids)
        assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_random_ones_and_clones(self):
        model = gt.KMeansModel(gt.KMeansModelConfig(3, 2))
        assert model.centroids.shape == (3, 2)
        assert torch.equal(model.clone().centroids, model.centroids)
        assert not torch.equal(model.clone(copy_parameters=False).centroids, model.centroids)
        with pytest.raises(ValueError, match="num_clusters must be at least 1"):
            gt.KMeansModel(gt.KMeansModelConfig(0, 2))

    def test_data_that_does_not_fit(self):
        model = gt.KMeansModel.of([[0.0, 1.0]])
        with pytest.raises(ValueError, match=r"takes \(n, 2\)"):
            model(torch.zeros(3, 1).double())
        with pytest.raises(TypeError, match="convert one with"):
            model(torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"centroids has shape \(3,\)"):
            gt.KMeansModel.of([0.0, 1.0, 2.0])
