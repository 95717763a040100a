import itertools
import math
import subprocess
import sys

import pytest
import torch

from kernels.entropy_attention import entropy_attention, tiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Where Triton is absent its tests cannot run; the others must.
try:
    from kernels.entropy_attention import triton as triton_kernels
except ImportError:
    triton_kernels = None
needs_triton = pytest.mark.skipif(triton_kernels is None, reason="Triton is not installed")

# Query heads, key-value heads, queries, keys: odd, grouped, more keys, more queries, single.
SHAPES = [(2, 2, 37, 37), (4, 2, 19, 45), (3, 1, 45, 19), (1, 1, 1, 33)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(DEVICE)


def inputs(shape, dtype=torch.float64, head_dim=8, batch=2, seed=0):
    heads, kv_heads, queries, keys = shape
    return (
        normal(batch, heads, queries, head_dim, seed=seed, dtype=dtype),
        normal(batch, kv_heads, keys, head_dim, seed=seed + 1, dtype=dtype),
        normal(batch, kv_heads, keys, head_dim, seed=seed + 2, dtype=dtype),
    )


def option(name, shape, dtype=torch.float64):
    """The arguments of one option, by name, for a batch of two."""
    heads, _, queries, keys = shape
    padding = normal(2, keys, seed=9) > 0
    factors = (
        normal(heads, queries, 3, seed=7, dtype=dtype),
        normal(2, 1, keys, 3, seed=8, dtype=dtype),
    )
    dense = normal(2, heads, queries, keys, seed=6)
    return {
        "full": {},
        "scale": {"scale": 0.7},
        "causal": {"causal": True},
        "window": {"window": 5},
        "causal window": {"causal": True, "window": 7},
        "temperature": {"temperature": normal(heads, seed=5).exp()},
        "bias": {"bias": dense[:, :1], "causal": True},
        "key bias": {"bias": dense[0, 0, 0]},
        "query bias": {"bias": dense[0, :, :, :1]},
        "hiding bias": {"bias": torch.where(dense > 0.5, -torch.inf, dense)},
        "factors": {"bias_factors": factors},
        "factors, temperature, causal": {
            "bias_factors": factors,
            "temperature": normal(heads, seed=5).exp(),
            "causal": True,
        },
        "padding": {"key_padding_mask": padding},
        "padding, factors, causal window": {
            "key_padding_mask": padding,
            "bias_factors": factors,
            "causal": True,
            "window": 6,
        },
        "all padding": {"key_padding_mask": torch.ones_like(padding)},
        "lengths": {"lengths": torch.tensor([0, keys // 2], device=DEVICE)},
        "lengths, causal window": {
            "lengths": torch.tensor([5, keys], device=DEVICE),
            "causal": True,
            "window": 3,
        },
    }[name]


LOW_RANK = ["factors", "factors, temperature, causal", "padding, factors, causal window"]
MASKS = ["causal", "window", "causal window", "padding", "all padding"]
PLAIN = ["full", "scale", "temperature", *MASKS, *LOW_RANK]
DENSE = ["bias", "key bias", "query bias", "hiding bias"]
LENGTHS = ["lengths", "lengths, causal window"]


def with_gradients(function, q, k, v, options):
    """Outputs, then the gradients of every tensor that has one, for fixed upstream gradients."""
    options = dict(options)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    for name in ("temperature", "bias"):
        if name in options:
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    if "bias_factors" in options:
        options["bias_factors"] = tuple(
            x.detach().clone().requires_grad_() for x in options["bias_factors"]
        )
        leaves += options["bias_factors"]
    out, entropy = function(*leaves[:3], **options)
    upstream = (normal(*out.shape, seed=11).to(out), normal(*entropy.shape, seed=12).to(entropy))
    gradients = torch.autograd.grad((out, entropy), leaves, upstream)
    return [out, entropy, *gradients]


def backend(name):
    return lambda *args, **options: entropy_attention(*args, backend=name, **options)


def close(actual, expected, rtol=1e-7, atol=1e-9):
    assert len(actual) == len(expected)
    assert all(x.isfinite().all() for x in actual)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def by_definition(
    q,
    k,
    v,
    causal=False,
    scale=None,
    temperature=None,
    window=None,
    bias=None,
    bias_factors=None,
    lengths=None,
    cu_seqlens=None,
    key_padding_mask=None,
):
    """Row by row: the visible keys listed one by one, then Σ p·v and −Σ p·log p over them."""
    batch, heads, queries, head_dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    dense = q.new_zeros(batch, heads, queries, keys)
    if bias is not None:
        dense = dense + bias
    if bias_factors is not None:
        dense = dense + torch.einsum("...mr,...nr->...mn", *bias_factors)

    def sees(b, i, j):
        position = i + keys - queries
        if (causal and j > position) or (window is not None and abs(j - position) >= window):
            return False
        if lengths is not None and max(i, j) >= lengths[b]:
            return False
        if cu_seqlens is not None and any((i < edge) != (j < edge) for edge in cu_seqlens):
            return False
        return key_padding_mask is None or not key_padding_mask[b, j]

    outs, entropies = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(keys) if sees(b, i, j) and dense[b, h, i, j] > -torch.inf]
                s = scale * k[b, h // group, seen] @ q[b, h, i]
                if temperature is not None:
                    s = s / temperature[h]
                p = (s + dense[b, h, i, seen]).softmax(0)
                outs.append(p @ v[b, h // group, seen])
                entropies.append(torch.special.entr(p).sum())
    return torch.stack(outs).view(q.shape), torch.stack(entropies).view(q.shape[:3])


@pytest.mark.parametrize("name", [*PLAIN, *DENSE])
@pytest.mark.parametrize("shape", [(2, 2, 6, 6), (4, 2, 5, 7), (2, 1, 7, 5)], ids=str)
def test_reference_is_the_definition(shape, name):
    q, k, v = inputs(shape)
    options = option(name, shape)
    close(
        with_gradients(backend("reference"), q, k, v, options),
        with_gradients(by_definition, q, k, v, options),
    )


@pytest.mark.parametrize("name", LENGTHS)
def test_reference_is_the_definition_for_lengths(name):
    shape = (2, 1, 8, 8)
    q, k, v = inputs(shape)
    options = option(name, shape)
    close(
        with_gradients(backend("reference"), q, k, v, options),
        with_gradients(by_definition, q, k, v, options),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_definition_for_packed_sequences(causal):
    q, k, v = inputs((2, 1, 9, 9), batch=1)
    options = {"cu_seqlens": torch.tensor([0, 2, 2, 6, 9], device=DEVICE), "causal": causal}
    close(
        with_gradients(backend("reference"), q, k, v, options),
        with_gradients(by_definition, q, k, v, options),
    )


def test_float32_reference_is_close_to_float64():
    shape = (4, 2, 33, 41)
    q, k, v = inputs(shape, torch.float32)
    options = option("factors, temperature, causal", shape, torch.float32)
    double = {**options, "bias_factors": tuple(x.double() for x in options["bias_factors"])}
    close(
        with_gradients(backend("reference"), q, k, v, options),
        with_gradients(backend("reference"), q.double(), k.double(), v.double(), double),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_gradcheck(implementation):
    q, k, v = (x.requires_grad_() for x in inputs((2, 1, 4, 5), head_dim=3, batch=1))
    temperature = normal(2, seed=5).exp().requires_grad_()
    bias = normal(2, 1, 5, seed=6).requires_grad_()
    factors = normal(2, 4, 2, seed=7).requires_grad_(), normal(1, 5, 2, seed=8).requires_grad_()

    def function(q, k, v, temperature, bias, *factors):
        return entropy_attention(
            q, k, v, temperature=temperature, bias=bias, bias_factors=factors, causal=True,
            window=3, backend=implementation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, temperature, bias, *factors))


def test_uniform_weights_have_the_entropy_of_their_number():
    """Equal keys: H = log n, its largest value, where the gradient of H vanishes."""
    q, k, v = inputs((2, 2, 7, 7))
    k = torch.zeros_like(k).requires_grad_()
    _, entropy = entropy_attention(q, k, v, causal=True)
    seen = torch.arange(1, 8, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(entropy, seen.log().expand(2, 2, 7))
    (gradient,) = torch.autograd.grad(entropy.sum(), k)
    assert gradient.abs().max() < 1e-12


def test_same_output_as_scaled_dot_product_attention():
    q, k, v = inputs((4, 2, 37, 37))
    out, _ = entropy_attention(q, k, v, causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("block", [64, 2**20])
@pytest.mark.parametrize("name", [*PLAIN, *DENSE, *LENGTHS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_is_the_reference(shape, name, block, monkeypatch):
    if name in LENGTHS and shape[2] != shape[3]:
        pytest.skip("lengths are of queries and keys alike")
    monkeypatch.setattr(tiled, "BLOCK", block)
    q, k, v = inputs(shape)
    options = option(name, shape)
    close(
        with_gradients(backend("tiled"), q, k, v, options),
        with_gradients(backend("reference"), q, k, v, options),
    )


@pytest.fixture
def poisoned():
    """Memory that is allocated but not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def blocks(m, n):
    return lambda *_: {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}


@needs_triton
@pytest.mark.parametrize("name", [*PLAIN, *LENGTHS])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_triton_is_the_reference(shape, name, monkeypatch, poisoned):
    """In blocks small enough that these lengths make cut, whole and ragged tiles."""
    if name in LENGTHS and shape[2] != shape[3]:
        pytest.skip("lengths are of queries and keys alike")
    monkeypatch.setattr(triton_kernels, "_config", blocks(16, 16))
    q, k, v = inputs(shape, torch.float32)
    options = option(name, shape, torch.float32)
    close(
        with_gradients(backend("triton"), q, k, v, options),
        with_gradients(backend("reference"), q, k, v, options),
        rtol=1e-4,
        atol=1e-5,
    )


@needs_triton
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal, implementation, monkeypatch, poisoned):
    """Each sequence as if it were alone."""
    monkeypatch.setattr(triton_kernels, "_config", blocks(16, 32))
    q, k, v = inputs((4, 2, 61, 61), torch.float32, batch=1)
    edges = [0, 5, 5, 38, 61]
    options = {"cu_seqlens": torch.tensor(edges, device=DEVICE), "causal": causal}
    packed = with_gradients(backend(implementation), q, k, v, options)

    def one_by_one(q, k, v):
        parts = [
            entropy_attention(*(x[:, :, a:b] for x in (q, k, v)), causal=causal)
            for a, b in itertools.pairwise(edges)
        ]
        return torch.cat([x[0] for x in parts], 2), torch.cat([x[1] for x in parts], 2)

    close(packed, with_gradients(one_by_one, q, k, v, {}), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_in_its_default_configuration(dtype, head_dim, poisoned):
    shape = (2, 1, 149, 149)
    q, k, v = inputs(shape, dtype, head_dim, batch=1)
    double = [x.double() for x in (q, k, v)]
    actual = with_gradients(backend("triton"), q, k, v, {"causal": True})
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    close(
        actual,
        with_gradients(backend("reference"), *double, {"causal": True}),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, implementation):
    """Only the inputs and outputs are rounded."""
    shape = (4, 2, 41, 41)
    q, k, v = inputs(shape, dtype)
    options = option("factors, temperature, causal", shape, dtype)
    double = {**options, "bias_factors": tuple(x.double() for x in options["bias_factors"])}
    actual = with_gradients(backend(implementation), q, k, v, options)
    expected = with_gradients(backend("reference"), q.double(), k.double(), v.double(), double)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-4, atol=1e-5)
    epsilon = torch.finfo(dtype).eps
    close(actual, expected, rtol=2 * epsilon, atol=4 * epsilon)


@needs_triton
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_scores(causal, implementation, monkeypatch, poisoned):
    """Whole numbers to ±10⁴, exact in float32: their softmax is as good as their logarithms'."""
    monkeypatch.setattr(triton_kernels, "_config", blocks(16, 16))
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randint(-50, 51, (1, 2, 37, 4), generator=generator).float().to(DEVICE)
        for _ in range(2)
    )
    q[0, 0, 3], k[0, 0, 3] = 50, 50
    q[0, 0, 4], k[0, 0, 4] = -50, 50
    v = normal(1, 2, 37, 4, dtype=torch.float32)
    options = {"causal": causal, "scale": 1.0}
    expected = with_gradients(backend("reference"), q.double(), k.double(), v.double(), options)
    assert (q @ k.mT).abs().max() == 1e4
    close(with_gradients(backend(implementation), q, k, v, options), expected, rtol=5e-3, atol=5e-2)


@needs_triton
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used, implementation, monkeypatch, poisoned):
    monkeypatch.setattr(triton_kernels, "_config", blocks(16, 16))
    q, k, v = (x.requires_grad_() for x in inputs((2, 1, 19, 23), torch.float32))
    actual = entropy_attention(q, k, v, backend=implementation)[used]
    expected = by_definition(q, k, v)[used]
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), (q, k, v), allow_unused=True),
        torch.autograd.grad(expected.square().sum(), (q, k, v), allow_unused=True),
    ):
        b = torch.zeros_like(v) if b is None else b
        torch.testing.assert_close(torch.zeros_like(v) if a is None else a, b, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
def test_any_layout(implementation, poisoned):
    """Heads beside features, as projections give them, and keys with strided features."""
    q, k, v = inputs((2, 2, 21, 21), torch.float32)
    expected = with_gradients(backend("reference"), q, k, v, {})
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.mT.contiguous().mT
    v = torch.cat([v, v], -1)[..., : v.shape[-1]]

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, entropy = entropy_attention(*leaves, backend=implementation)
    upstream = (normal(*out.shape, seed=11).float(), normal(*entropy.shape, seed=12).float())
    gradients = torch.autograd.grad((out, entropy), leaves, upstream)
    close([out, entropy, *gradients], expected, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("shape", [(2, 2, 0, 5), (2, 1, 5, 0)], ids=str)
def test_nothing_to_attend(shape, implementation, poisoned):
    results = with_gradients(backend(implementation), *inputs(shape, torch.float32), {})
    assert all((x == 0).all() for x in results)


@needs_triton
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
def test_autocast(implementation):
    """Products in bfloat16, gradients in the inputs' dtype, also if the backward is inside."""
    shape = (2, 1, 19, 19)
    q, k, v = inputs(shape, torch.float32)
    options = option("factors", shape, torch.float32)
    half = {"bias_factors": tuple(x.bfloat16() for x in options["bias_factors"])}
    expected = with_gradients(
        backend(implementation), q.bfloat16(), k.bfloat16(), v.bfloat16(), half
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = with_gradients(backend(implementation), q, k, v, options)
    assert [x.dtype for x in actual[:3]] == [torch.bfloat16, torch.float32, torch.float32]
    if implementation == "reference":  # its backward is autograd's, whose products follow autocast
        actual, expected = actual[:2], expected[:2]
    for a, b in zip(actual, expected):
        assert torch.equal(a, b.to(a.dtype))


def test_repeats_bit_by_bit():
    q, k, v = inputs((4, 2, 130, 130), torch.float32)
    first, second = (with_gradients(entropy_attention, q, k, v, {"causal": True}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_in_a_compiled_function():
    q, k, v = inputs((2, 1, 19, 19), torch.float32)

    def function(q, k, v):
        out, entropy = entropy_attention(q * 2, k, v, causal=True)
        return out + 1, entropy * 2

    compiled = torch.compile(function, backend="aot_eager")
    close(with_gradients(compiled, q, k, v, {}), with_gradients(function, q, k, v, {}))


PIPE = {"check": True, "capture_output": True, "text": True}
CHILD = """
import sys, torch
from kernels.entropy_attention import entropy_attention

def extra(tokens):
    q, k, v = (torch.randn(1, 4, tokens, 64, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, 4, tokens, 64), torch.randn(1, 4, tokens)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again at the current size
    before = memory("VmRSS")
    results = entropy_attention(q, k, v, backend=sys.argv[1])
    torch.autograd.backward(results, upstream)
    return memory("VmHWM") - before

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

extra(64)  # libraries, thread pools
print(extra(4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_of_a_tenth_of_the_materialised_form():
    extra = {
        name: int(subprocess.run([sys.executable, "-c", CHILD, name], **PIPE).stdout)
        for name in ("reference", "tiled")
    }
    assert extra["reference"] > 2 * 4 * 4096**2 * 4 / 1024  # two matrices, in KiB
    assert extra["tiled"] <= 0.1 * extra["reference"]


def wrong(**changes):
    q, k, v = inputs((4, 2, 5, 5), torch.float32)
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "q dims": ("q", lambda: {"q": torch.zeros(4, 5, 8)}),
        "q int": ("q", lambda: {"q": torch.zeros(2, 4, 5, 8, dtype=torch.long)}),
        "k dtype": ("k", lambda: {"k": torch.zeros(2, 2, 5, 8, dtype=torch.float64)}),
        "k batch": ("k", lambda: {"k": torch.zeros(3, 2, 5, 8)}),
        "k head_dim": ("k", lambda: {"k": torch.zeros(2, 2, 5, 7), "v": torch.zeros(2, 2, 5, 7)}),
        "k heads": ("k", lambda: {"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)}),
        "v shape": ("v", lambda: {"v": torch.zeros(2, 2, 6, 8)}),
        "scale": ("scale", lambda: {"scale": math.nan}),
        "temperature": ("temperature", lambda: {"temperature": torch.ones(3)}),
        "window": ("window", lambda: {"window": 0}),
        "bias shape": ("bias", lambda: {"bias": torch.zeros(4, 5, 6)}),
        "bias dtype": ("bias", lambda: {"bias": torch.zeros(5, 5, dtype=torch.bool)}),
        "factors rank": (
            "bias_factors",
            lambda: {"bias_factors": (torch.zeros(4, 5, 2), torch.zeros(4, 5, 3))},
        ),
        "factors heads": (
            "bias_factors",
            lambda: {"bias_factors": (torch.zeros(2, 5, 3), torch.zeros(4, 5, 3))},
        ),
        "factors number": ("bias_factors", lambda: {"bias_factors": (torch.zeros(4, 5, 2),)}),
        "lengths number": ("lengths", lambda: {"lengths": torch.tensor([1])}),
        "lengths range": ("lengths", lambda: {"lengths": torch.tensor([1, 6])}),
        "lengths dtype": ("lengths", lambda: {"lengths": torch.tensor([1.0, 2.0])}),
        "lengths, queries": (
            "lengths",
            lambda: {"lengths": torch.tensor([1, 2]), "q": torch.zeros(2, 4, 3, 8)},
        ),
        "lengths and cu_seqlens": (
            "lengths",
            lambda: {"lengths": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 5])},
        ),
        "cu_seqlens batch": ("cu_seqlens", lambda: {"cu_seqlens": torch.tensor([0, 5])}),
        "padding dtype": (
            "key_padding_mask",
            lambda: {"key_padding_mask": torch.zeros(2, 5)},
        ),
        "padding shape": (
            "key_padding_mask",
            lambda: {"key_padding_mask": torch.zeros(5, 2, dtype=torch.bool)},
        ),
        "backend": ("backend", lambda: {"backend": "cuda"}),
        "devices": (
            "device",
            lambda: {"k": torch.zeros(2, 2, 5, 8, device="meta")},
        ),
    }.values(),
)
def test_bad_input(name, make):
    with pytest.raises(ValueError, match=name):
        entropy_attention(**wrong(**make()))


@pytest.mark.parametrize("edges", [[0, 4], [1, 5], [0, 3, 2, 5], [0]])
def test_bad_packing(edges):
    q, k, v = (torch.zeros(1, 2, 5, 8) for _ in range(3))
    with pytest.raises(ValueError, match="cu_seqlens"):
        entropy_attention(q, k, v, cu_seqlens=torch.tensor(edges))


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "options"),
    [
        ("q", torch.float64, 8, {}),
        ("q", torch.float32, 257, {}),
        ("bias", torch.float32, 8, {"bias": torch.zeros(5, 5)}),
        ("bias_factors", torch.float32, 8, {"bias_factors": (torch.zeros(2, 5, 129),) * 2}),
    ],
)
def test_what_triton_lacks_falls_to_tiled_only_when_not_asked_for(name, dtype, head_dim, options):
    q, k, v = (torch.zeros(1, 2, 5, head_dim, dtype=dtype) for _ in range(3))
    with pytest.raises(ValueError, match=name):
        entropy_attention(q, k, v, backend="triton", **options)
    _, entropy = entropy_attention(q, k, v, **options)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(5)))
