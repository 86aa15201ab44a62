"""Residual structures and shared depth: what the papers write, the laws, the files."""

import json

import pytest
import torch

import manyform
from manyform import contract, state
from manyform.config import RESIDUALS, ModelConfig, parse_pattern
from manyform.decoding import Decoder
from manyform.errors import ManyformError
from manyform.structures.universal import UniversalTransformer

N = 3  # layers


def untied(residual):
    """The head of two streams cannot share the embedding's weights."""
    return {"tie": False} if residual == "reversible" else {}


def model_of(residual, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"vocab_size": 13, "d_model": 16, "n_layers": N, "norm": "layer", "channel": "mlp",
                **untied(residual), **options}
    model = manyform.create("llama", residual=residual, **settings).double()
    for name, p in model.named_parameters():  # so that no norm is the identity on a normed input
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def ln(module, x):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * module.weight + module.bias


def f(part, x):
    return part(x)[0]


def post(blocks, x, alpha=1.0):
    for b in blocks:
        x = ln(b.mixer_norm, alpha * x + f(b.mixer, x))
        x = ln(b.channel_norm, alpha * x + f(b.channel, x))
    return x


def pre(blocks, x):
    for b in blocks:
        x = x + f(b.mixer, ln(b.mixer_norm, x))
        x = x + f(b.channel, ln(b.channel_norm, x))
    return x


def sandwich(blocks, x):
    for b in blocks:
        x = x + ln(b.mixer_out_norm, f(b.mixer, ln(b.mixer_norm, x)))
        x = x + ln(b.channel_out_norm, f(b.channel, ln(b.channel_norm, x)))
    return x


def reordered(blocks, x):
    for b in blocks:
        x = x + ln(b.mixer_norm, f(b.mixer, x))
        x = x + ln(b.channel_norm, f(b.channel, x))
    return x


def parallel(blocks, x):
    for b in blocks:
        x = x + f(b.mixer, ln(b.mixer_norm, x)) + f(b.channel, ln(b.mixer_norm, x))
    return x


def parallel_two_norms(blocks, x):
    for b in blocks:
        x = x + f(b.mixer, ln(b.mixer_norm, x)) + f(b.channel, ln(b.channel_norm, x))
    return x


def none(blocks, x):
    for b in blocks:
        x = f(b.channel, ln(b.channel_norm, f(b.mixer, ln(b.mixer_norm, x))))
    return x


def reversible(blocks, x):
    """Kitaev 2020, eq. 9, both streams side by side at the end."""
    x1 = x2 = x
    for b in blocks:
        x1 = x1 + f(b.mixer, ln(b.mixer_norm, x2))
        x2 = x2 + f(b.channel, ln(b.channel_norm, x1))
    return torch.cat([x1, x2], -1)


def residual_dual(blocks, x, final):
    """Xie 2023, eq. 3 to 5: sublayers k = 0 ... 2 N - 1."""
    norms = [n for b in blocks for n in (b.mixer_norm, b.channel_norm)]
    parts = [p for b in blocks for p in (b.mixer, b.channel)]
    x_ln = x_d = x
    for norm, part in zip(norms, parts, strict=True):
        y = f(part, x_ln)
        x_ln, x_d = ln(norm, x_ln + y), x_d + y
    return x_ln + ln(final, x_d)


@pytest.mark.parametrize("residual", RESIDUALS)
@torch.no_grad()
def test_residual_structures_follow_their_equations(residual):
    model = model_of(residual)
    tokens = torch.randint(13, (2, 11))
    x = model.embedding(tokens)
    if residual == "residual_dual":
        want = residual_dual(model.blocks, x, model.final_norm)
    elif residual in ("post", "deepnorm"):
        want = post(model.blocks, x, (2 * N) ** 0.25 if residual == "deepnorm" else 1.0)
    else:
        want = ln(model.final_norm, globals()[residual](model.blocks, x))
    got, _ = model.features(tokens)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", sorted(set(RESIDUALS) - {"pre", "none"}))
def test_residual_structures_obey_the_laws(residual):
    options = {"residual": residual, "d_model": 16, **untied(residual)}
    manyform.check("llama", **options)
    manyform.check("llama", channel=None, **options, laws=["streaming", "cost"],
                   precisions=["float32"])


@pytest.mark.parametrize("residual", ["post", "deepnorm", "residual_dual", "sandwich"])
def test_residual_structures_serve_other_mixers(residual):
    if residual == "deepnorm":
        with pytest.raises(ManyformError, match="deepnorm"):
            manyform.create("mamba", vocab_size=5, d_model=16, residual=residual)
        return
    manyform.check("mamba2", residual=residual, d_model=16, precisions=["bfloat16"])


def test_deepnorm_scales_the_initial_values():
    """Wang 2022, figure 2: Xavier with a gain of (8 N)^(-1/4) for values, outputs, feed-forward."""
    torch.manual_seed(0)
    d, layers = 256, 8
    block = manyform.create("llama", vocab_size=5, d_model=d, n_layers=layers,
                            residual="deepnorm").blocks[0]
    beta = (8 * layers) ** -0.25
    q, k, v = block.mixer.qkv.weight.split(d)
    for weight, gain in ((q, 1), (k, 1), (v, beta), (block.mixer.out.weight, beta),
                         (block.channel.down.weight, beta)):
        want = gain * (2 / sum(weight.shape)) ** 0.5
        assert abs(float(weight.detach().std()) / want - 1) < 0.03


def test_configurations_from_before_the_choice_still_load():
    values = manyform.create("llama", vocab_size=5, d_model=16).config.to_dict()
    assert values["residual"] == "pre"
    for old, new in ((True, "pre"), (False, "none")):
        old_values = json.loads(json.dumps({**values, "residual": old}))
        for layer in old_values["pattern"]:
            del layer["share"]
        assert ModelConfig.from_dict(old_values).residual == new
    with pytest.raises(ManyformError, match="sandwich"):
        manyform.create("llama", vocab_size=5, residual="sandwhich")


@pytest.mark.parametrize("residual", RESIDUALS)
@torch.no_grad()
def test_decoding_follows_the_model(residual):
    model = model_of(residual).float()
    decoder = Decoder.of(model, None)
    assert (decoder is not None) == (residual in ("pre", "none"))
    tokens = torch.randint(13, (1, 7))
    got = model.generate(tokens, 5, greedy=True).tokens
    want = tokens
    for _ in range(5):
        want = torch.cat([want, model(want)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(got[:, -5:], want[:, -5:])


def shared_model(pattern="attention @ all", layers=3, **options):
    torch.manual_seed(0)
    return manyform.create(pattern, vocab_size=13, d_model=16, n_layers=layers, **options)


def test_layers_share_weights_and_keep_states_of_their_own(tmp_path):
    one, three = shared_model(layers=1), shared_model(layers=3)
    assert three.num_params() == one.num_params()
    head = 2 * 16 * 13 * 40
    assert three.cost(40).flops - head == 3 * (one.cost(40).flops - head)
    tokens = torch.randint(13, (2, 9))
    x = three.embedding(tokens)
    for _ in range(3):
        x, _ = three.blocks[0](x)
    got, after = three.features(tokens)
    torch.testing.assert_close(got, three.final_norm(x))
    assert len(after.layers) == 3
    assert not torch.equal(after.layers[0].mixer.keys, after.layers[1].mixer.keys)
    three.save(tmp_path)
    assert torch.equal(manyform.load(tmp_path)(tokens)[0], three(tokens)[0])
    manyform.check(three)
    report = manyform.check("2 mamba2 : attention @ a : 2 mamba2 : attention @ a",
                            precisions=["float32"])
    assert report.passed


@torch.no_grad()
def test_shared_layers_decode_as_the_model_does():
    model = shared_model("mamba2 : attention @ a", layers=4).eval()
    decoder = Decoder.of(model, None)
    tokens = torch.randint(13, (1, 12))
    want, after = model(tokens)
    got = torch.stack([decoder.step(int(t)) for t in tokens[0]], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(list(state.tensors(decoder.state()))) == len(list(state.tensors(after)))


def test_patterns_name_what_is_shared():
    layers = parse_pattern("2 mamba2 : attention(window=4) + mlp @ a : 2 attention @ b")
    assert [layer.share for layer in layers] == [None, None, "a", "b", "b"]
    assert layers[2].mixer_options == {"window": 4}
    assert layers[2].channel == "mlp"
    with pytest.raises(ManyformError, match="alike"):
        manyform.create("attention @ a : attention(window=4) @ a", vocab_size=5)


class Term(manyform.SequenceMixer):
    """Passes its input on and adds 0.25 to the loss."""

    shares = True

    def forward(self, x, state=None, *, reset=None, shared):
        contract.add_loss(shared, "term", x.new_tensor(0.25))
        assert shared["tokens"].shape == x.shape[:2]
        return x, None

    def initial_state(self, batch_size, *, device=None):
        return None

    def cost(self, length):
        return manyform.Cost(0, 0)


def test_terms_that_layers_add_are_part_of_the_training_loss_only():
    torch.manual_seed(0)
    model = manyform.create("tests.test_structures:Term", vocab_size=5, d_model=16, n_layers=2)
    tokens = torch.randint(5, (2, 6))
    training = model.train().loss(tokens, tokens)[0]
    evaluation = model.eval().loss(tokens, tokens)[0]
    torch.testing.assert_close(training - evaluation, torch.tensor(0.5))


def test_two_streams_side_by_side_refuse_what_reads_one():
    for options, match in (({}, "tie=False"), ({"tie": False, "exits": (1,)}, "exits cannot read"),
                           ({"tie": False, "head_map": "gelu"}, "no head_map")):
        with pytest.raises(ManyformError, match=match):
            manyform.create("llama", vocab_size=5, residual="reversible", **options)
    with pytest.raises(ManyformError, match="a setting of the model"):
        UniversalTransformer(16, residual="reversible")


@torch.no_grad()
def test_axial_positions_are_a_row_and_a_column(tmp_path):
    model = manyform.create("llama", vocab_size=7, d_model=8, n_layers=1, position="axial",
                            axial_shape=(3, 4), axial_dims=(2, 6), max_length=12)
    got = model._position_embedding(torch.arange(12))
    for p in range(12):
        want = torch.cat([model.positions.rows[p // 4], model.positions.columns[p % 4]])
        assert torch.equal(got[p], want)
    model.save(tmp_path)
    tokens = torch.randint(7, (1, 12))
    again = manyform.load(tmp_path)
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.config == model.config
    first, state = model(tokens[:, :5])
    rest, _ = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), model(tokens)[0])
    with pytest.raises(ManyformError, match="past the axial position table of 12 rows"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    for options, match in (
            ({"axial_shape": (3, 4)}, "axial_dims as two"), ({"position": "learned", "axial_shape":
                                                              (3, 4)}, "need position='axial'"),
            ({"axial_shape": (2, 4), "axial_dims": (2, 6)}, "fewer places"),
            ({"axial_shape": (3, 4), "axial_dims": (2, 5)}, "add up to d_model")):
        with pytest.raises(ManyformError, match=match):
            manyform.create("llama", **{"vocab_size": 7, "d_model": 8, "n_layers": 1,
                                        "position": "axial", "max_length": 12, **options})
