"""The attention U-Net that predicts the noise, with time and class embeddings (2.1, 2.4 a).

Architecture and parameter names are the exercise skeleton's, which follows "The Annotated Diffusion Model"
(https://huggingface.co/blog/annotated-diffusion), so that checkpoints trained with it load here.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ATTENTION_POSITIONS = 32 * 32  # full attention costs positions^2
NULL_TOKENS = ("learned", "zero")
CACHED_ELEMENTS = 2**20  # of queries in a chunk of linear attention on a CPU: 4 MB stay in its cache


class SinusoidalPositionEmbeddings(nn.Module):
    """Turns the time t into a vector the network can compute with: the positional encoding (2.1).

    A network cannot do much with a raw integer such as t = 731: it is huge beside the other activations. So t is shown
    as the hands of many clocks: dim/2 pairs (sin(w t), cos(w t)) whose frequencies w fall geometrically from 1 to
    1/10000. The fast clocks tell t from t + 1, the slow ones early from late, and every value stays in [-1, 1]. A shift
    of t turns every pair by a fixed angle, whatever t is, so "a little later" means the same everywhere.

    (B,) -> (B, dim). Vaswani et al. 2017, section 3.5 (https://arxiv.org/abs/1706.03762).
    Raises ValueError: dim is odd or below 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the time embedding needs an even width of at least 4, got dim={dim}")
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / (half - 1)))  # (dim/2,)
        angles = time[:, None] * frequencies[None, :]  # (B, dim/2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # (B, dim)


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 (Qiao et al. 2019, https://arxiv.org/abs/1903.10520)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept: tuple | None = None  # (state of the weights, their standardised form), while nothing trains

    def train(self, mode: bool = True) -> WeightStandardizedConv2d:
        if mode:  # fused optimisers may not bump `weight._version`, so drop the cache
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return self._conv_forward(x, self.standardized(), self.bias)
        state = (self.weight._version, self.weight.data_ptr())
        if self.kept is None or self.kept[0] != state:
            self.kept = (state, self.standardized())
        return self._conv_forward(x, self.kept[1], self.bias)

    def standardized(self) -> Tensor:
        # By the weights' type and not by x's, so that a model trained under autocast is evaluated as the same function.
        eps = 1e-5 if self.weight.dtype == torch.float32 else 1e-3
        return F.layer_norm(self.weight, self.weight.shape[1:], eps=eps)


class Block(nn.Module):
    """3x3 convolution, group norm, FiLM (scale and shift by the embedding, https://arxiv.org/abs/1709.07871), SiLU."""

    def __init__(self, dim: int, dim_out: int, groups: int):
        super().__init__()
        self.proj = WeightStandardizedConv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))  # (B, dim_out, H, W)
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return self.act(x)


class ResnetBlock(nn.Module):
    """Two `Block`s with a shortcut; the first is conditioned on the embedding of time and class."""

    def __init__(self, dim: int, dim_out: int, *, emb_dim: int, groups: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale_shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)  # 2 x (B, dim_out, 1, 1)
        h = self.block1(x, scale_shift)
        return self.block2(self.dropout(h)) + self.res_conv(x)


def flatten_positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), so that 1x1 convolutions are matrix products. No copy if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def unflatten_positions(pixels: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `flatten_positions`, channels-last."""
    return pixels.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention of every position to every other; Vaswani et al. 2017."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)  # see `attention`

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        if height * width > MAX_ATTENTION_POSITIONS:
            advice = "give more levels (dim_mults) or smaller images, so that the innermost level is at most 32x32"
            raise ValueError(f"full attention over {height}x{width} positions would not fit: {advice}")
        pixels = flatten_positions(x)  # (B, H*W, C)
        qkv = F.linear(pixels, self.to_qkv.weight.flatten(1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, heads, H*W, dim_head)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H*W, heads*dim_head)
        out = F.linear(out, self.to_out.weight.flatten(1), self.to_out.bias)
        return unflatten_positions(out, height, width)


class LinearAttention(nn.Module):
    """Self-attention whose cost grows with the positions, not with their square; Shen et al. 2018.

    https://arxiv.org/abs/1812.01243: out = W_out (W_v x softmax(k)^T) softmax(q), the product in brackets first. It has
    no positions left, so W_v and W_out are multiplied into it and not applied to every pixel: the same function with a
    third less arithmetic at 32 channels.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.in_parts = True  # a CPU takes a batch in parts; no tracer can
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), nn.GroupNorm(1, dim))
        nn.init.zeros_(self.to_out[1].weight)  # see `attention`

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        pixels, norm = flatten_positions(x), self.to_out[1]  # (B, H*W, C)
        # Queries and keys are the largest tensors of all: a CPU waits for its memory unless they stay in its cache.
        size = max(1, CACHED_ELEMENTS // (height * width * self.to_qkv.out_channels // 3))
        parts = pixels.split(size) if x.device.type == "cpu" and self.in_parts else [pixels]
        out = torch.cat([self.attend(part) for part in parts])  # (B, H*W, C)
        return norm(unflatten_positions(out, height, width))

    def attend(self, x: Tensor) -> Tensor:
        """(B, positions, C) -> (B, positions, C)."""
        project, _ = self.to_out
        w_q, w_k, w_v = self.to_qkv.weight.flatten(1).chunk(3)  # 3 x (heads*dim_head, C)
        q = F.linear(x, w_q).unflatten(-1, (self.heads, -1)).softmax(dim=-1).flatten(2)  # (B, H*W, heads*dim_head)
        k = (w_k.expand(x.shape[0], -1, -1) @ x.transpose(1, 2)).softmax(dim=-1)  # (B, heads*dim_head, H*W)

        seen = (k @ x).unflatten(1, (self.heads, -1))  # (B, heads, dim_head, C)
        w_v = w_v.unflatten(0, (self.heads, -1))  # (heads, dim_head, C)
        context = seen @ w_v.transpose(1, 2)  # (B, heads, dim_head, dim_head)
        w_out = project.weight.flatten(1).unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # (heads, dim_head, C)
        mixing = (context @ (w_out * self.scale)).flatten(1, 2)  # (B, heads*dim_head, C)
        return torch.baddbmm(project.bias, q, mixing)


class PreNorm(nn.Module):
    """Group norm over all channels before `fn`."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.norm = nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """Adds the input of `fn` to its output."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def attention(dim: int, kind: type[nn.Module]) -> nn.Module:
    """Residual pre-norm attention, zero-initialised: the block starts as the identity and trains faster.

    Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233.
    """
    return Residual(PreNorm(dim, kind(dim)))


def Downsample(dim: int, dim_out: int) -> nn.Module:
    """Halves height and width: 2x2 pixels become 4 channels, then a 1x1 convolution. (B, dim_out, H/2, W/2)."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(dim * 4, dim_out, 1))


class Upsample(nn.Sequential):
    """Doubles height and width by repeating pixels, then a 3x3 convolution. (B, dim_out, 2H, 2W).

    Of the nine repeated pixels under a filter only four differ. So it is a transposed convolution of stride 2 whose
    filters are sums of the weights: the same function, with 4 multiplications instead of 9.
    """

    def __init__(self, dim: int, dim_out: int):
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        _, conv = self
        # Each 3x3 weight is added at the 2x2 positions of its upsampled pixel.
        filters = sum(F.pad(conv.weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))  # (dim_out, dim, 4, 4)
        filters = filters.flip(2, 3).transpose(0, 1)  # as transposed convolutions have them
        return F.conv_transpose2d(x, filters, conv.bias, stride=2, padding=1)


class Unet(nn.Module):
    """Predicts the noise eps in x_t from x_t, the time, and optionally the class; Ho et al. 2020, appendix B.

    Args:
        dim: base width; level i has dim * dim_mults[i] channels.
        init_dim: width after the first convolution; None is dim.
        out_dim: output channels; None is `channels`.
        dim_mults: one entry per level; every level but the last halves the image.
        channels: of the image.
        resnet_block_groups: groups of the group norms; a ValueError where they don't divide every width.
        class_free_guidance: make a class-conditional model (2.4 a) of `num_classes` classes, whose labels are replaced
            by the null class with probability `p_uncond` (None is 0.1) per sample, in training mode only.
        null_token: what stands for "no class": "learned" (a trainable vector) or "zero".
        dropout: fraction of activations dropped between the two convolutions of a block, in training mode only.

    Attributes:
        null_class: the label that means "no class", one past the last class; None for an unconditional model.
    """

    def __init__(
        self,
        dim,
        init_dim=None,
        out_dim=None,
        dim_mults=(1, 2, 4, 8),
        channels=3,
        resnet_block_groups=4,
        class_free_guidance=False,
        p_uncond=None,
        num_classes=None,
        null_token="learned",
        dropout=0.0,
    ):
        super().__init__()
        init_dim = dim if init_dim is None else init_dim
        widths = [init_dim, *(dim * mult for mult in dim_mults)]
        for width in (dim, *widths):
            if width % resnet_block_groups:
                given = f"dim={dim}, init_dim={init_dim}, dim_mults={tuple(dim_mults)}"
                what = f"group norm can't split {width} channels into {resnet_block_groups} groups ({given})"
                raise ValueError(f"{what}: use multiples of {resnet_block_groups}")
        emb_dim = dim * 4
        block = partial(ResnetBlock, emb_dim=emb_dim, groups=resnet_block_groups, dropout=dropout)

        self.channels, self.out_dim = channels, channels if out_dim is None else out_dim
        self.compiled = False  # see `compile_blocks`
        self.size_factor = 2 ** (len(dim_mults) - 1)  # image sides must be multiples of it

        self.init_conv = nn.Conv2d(channels, init_dim, 1)
        self.time_mlp = nn.Sequential(
            SinusoidalPositionEmbeddings(dim), nn.Linear(dim, emb_dim), nn.GELU(), nn.Linear(emb_dim, emb_dim)
        )
        levels, self.downs = list(zip(widths[:-1], widths[1:])), nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(levels):
            last = i == len(levels) - 1
            shrink = nn.Conv2d(dim_in, dim_out, 3, padding=1) if last else Downsample(dim_in, dim_out)
            stages = [block(dim_in, dim_in), block(dim_in, dim_in), attention(dim_in, LinearAttention), shrink]
            self.downs.append(nn.ModuleList(stages))

        self.mid_block1 = block(widths[-1], widths[-1])
        self.mid_attn = attention(widths[-1], Attention)
        self.mid_block2 = block(widths[-1], widths[-1])

        self.ups = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(reversed(levels)):
            last = i == len(levels) - 1
            grow = nn.Conv2d(dim_out, dim_in, 3, padding=1) if last else Upsample(dim_out, dim_in)
            wide = dim_out + dim_in  # with the skip connection
            stages = [block(wide, dim_out), block(wide, dim_out), attention(dim_out, LinearAttention), grow]
            self.ups.append(nn.ModuleList(stages))

        self.final_res_block = block(init_dim * 2, dim)
        self.final_conv = nn.Conv2d(dim, self.out_dim, 1)
        # Last, so that with the same seed all other weights start the same whatever the conditioning.
        self._init_class_conditioning(class_free_guidance, p_uncond, num_classes, null_token, emb_dim)

    def _init_class_conditioning(self, class_free_guidance, p_uncond, num_classes, null_token, emb_dim) -> None:
        self.class_free_guidance, self.null_class = class_free_guidance, None
        if not class_free_guidance:
            return
        self.p_uncond = 0.1 if p_uncond is None else p_uncond
        if num_classes is None or num_classes < 1:
            raise ValueError(f"classifier-free guidance needs num_classes of at least 1, got {num_classes}")
        if not 0 <= self.p_uncond <= 1:
            raise ValueError(f"p_uncond is a probability, 0 .. 1; got {p_uncond}")
        if null_token not in NULL_TOKENS:
            raise ValueError(f"null_token must be one of {', '.join(NULL_TOKENS)}, got {null_token!r}")
        self.null_class = num_classes
        self.class_emb = nn.Embedding(num_classes, emb_dim)
        if null_token == "learned":
            self.null_token = nn.Parameter(torch.randn(emb_dim))  # as nn.Embedding initialises its rows
        else:
            self.register_buffer("null_token", torch.zeros(emb_dim))

    def drop_labels(self, classes: Tensor) -> Tensor:
        """A copy of `classes` (B,) in which each label is replaced by the null class with probability p_uncond."""
        dropped = torch.rand(classes.shape, device=classes.device) < self.p_uncond
        return classes.masked_fill(dropped, self.null_class)

    def embed_classes(self, classes: Tensor | None, batch_size: int) -> Tensor:
        """(B, emb_dim): the class embedding, or the null token where the label is `null_class` or none is given."""
        if classes is None:
            return self.null_token.expand(batch_size, -1)
        if classes.shape != (batch_size,):
            raise ValueError(f"expected {batch_size} class labels, one per image; got shape {tuple(classes.shape)}")
        if self.training:
            classes = self.drop_labels(classes)
        return F.embedding(classes, torch.cat((self.class_emb.weight, self.null_token[None])))

    def forward(self, x: Tensor, time: Tensor, classes: Tensor | None = None) -> Tensor:
        """eps (B, out_dim, H, W) for noisy images x (B, channels, H, W) at timesteps (B,).

        `classes` (B,) are labels 0 .. num_classes - 1, or `null_class`; None is the null class for all. A ValueError
        for H or W no multiple of 2^(levels - 1), and for labels of an unconditional model.
        """
        if x.shape[-1] % self.size_factor or x.shape[-2] % self.size_factor:
            what = f"images of {x.shape[-2]}x{x.shape[-1]} pixels can't be halved {len(self.downs) - 1} times"
            raise ValueError(f"{what}: their sides must be multiples of {self.size_factor}")
        if classes is not None and not self.class_free_guidance:
            raise ValueError("this U-Net is unconditional and takes no classes (train with class_free_guidance)")
        emb = self.time_mlp(time)  # (B, 4 dim)
        if self.class_free_guidance:
            emb = emb + self.embed_classes(classes, x.shape[0])  # not len(x), which a tracer takes for a constant

        if x.device.type == "cpu" or self.compiled:  # faster so; on a GPU only compiled group norms keep it
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.init_conv(x)  # (B, init_dim, H, W)
        first = x
        skips = []
        for block1, block2, attn, shrink in self.downs:
            x = block1(x, emb)
            skips.append(x)
            x = attn(block2(x, emb))
            skips.append(x)
            x = shrink(x)  # (B, dim * mult, H/2, W/2); the last level keeps H and W

        x = self.mid_block2(self.mid_attn(self.mid_block1(x, emb)), emb)

        for block1, block2, attn, grow in self.ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), emb)
            x = attn(block2(torch.cat((x, skips.pop()), dim=1), emb))
            x = grow(x)  # (B, dim * mult of the level above, 2H, 2W)
        assert not skips, "every skip connection is used once"

        x = self.final_res_block(torch.cat((x, first), dim=1), emb)  # (B, dim, H, W)
        return self.final_conv(x).contiguous()
