"""Features of an image: what stands behind some of the blocks, pooled as it is computed; indices are timm's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast.checks import whole_number
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.files import shown


class IntermediatesMixin(nn.Module):
    """``forward_intermediates`` of the three model classes, whose network is ``base_model``."""

    def forward_intermediates(
        self,
        input_ids: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        pool: str | None = "mean",
        bands: int = 1,
        norm: bool = True,
        stop_early: bool = True,
        embedding: bool = False,
        intermediates_only: bool = True,
        dtype: str | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What stands behind some of the blocks: the features that the paper probes, of every layer in one pass.

        Which number is which, for a network of L blocks, whose index ``i`` is timm's:

        ==================  =================  ===========================  =====================
        here, as in timm    the paper's layer  transformers' hidden_states  ``norm=True`` applies
        ==================  =================  ===========================  =====================
        ``embedding=True``  0                  ``[0]``                      ``h[0].ln_1``
        ``i``, not L - 1    ``i + 1``          ``[i + 1]``                  ``h[i + 1].ln_1``
        ``L - 1`` or -1     L                  ``[L]``, which has ``ln_f``  ``ln_f``
        ==================  =================  ===========================  =====================

        With ``embedding=True`` and ``indices=None``, the l-th of the L + 1 results is that of the paper's layer l. Its
        probes take the mean over positions of ``n^l = ln_1(h^l)``, which the defaults give, with SOS in front.

        Pooled features are all that is kept: memory does not grow with the layers that are asked for, and no block
        behind the last one of these runs. Gradients, autocast, hooks of the blocks and gradient checkpointing are as
        in ``forward``.

        Args:
            input_ids: (B, T) int64 colour tokens and SOS; (T,) is one image. As the paper feeds a causal model, T is
                H * W and position 0 is SOS: ``[SOS, x_0 .. x_(T - 2)]``.
            indices: Of blocks, from 0 and ascending; negative ones count from the end. A number n: the last n blocks.
                ``None``: all. An empty list goes with ``embedding=True``.
            pool: ``"mean"``: over the positions, in float32 (float64 of a float64 model). ``None``: every position, in
                the dtype of the states.
            bands: Parts of so many equal numbers of positions, each with a mean of its own: horizontal bands of the
                image, of whole rows where ``bands`` divides the height. It divides T. Positions are counted as they
                are fed: behind SOS, the pixel at ``t`` is position ``t + 1``, and every band begins with the last
                pixel of the band before.
            norm: Apply the norm that comes next: ``ln_1`` of the block behind, or ``ln_f``. ``False``: the plain sum
                of the residual path.
            stop_early: Run no block behind the last one that is asked for. ``False`` runs them all.
            embedding: Put what stands before the first block in front of the results.
            intermediates_only: ``False`` returns, as timm does, a pair: first what the last block that has run leaves
                behind ``ln_f``, (B, T, n_embd), then the list.
            dtype: ``"int8"`` computes in 8 bits, faster and a little less exact, where ``engines.cpu.forward`` can;
                ``None`` in the model's dtype.

        Returns:
            A list of a tensor for each index, in their order: (B, n_embd); (B, bands, n_embd) of more than one band;
            (B, T, n_embd) without pooling. (T,) ids give these without B. A list, which is timm's with
            ``intermediates_only=True``: what ``zip(indices, ...)`` and ``torch.stack`` take, and the states of all
            positions, which timm's default computes as well, are not wanted by who pools.

        Raises:
            BackendUnavailableError: ``dtype`` is given, and nothing here computes this input in it.
            ValueError: An index out of range, not ascending or none at all, an unknown ``pool``, ``bands`` that do
                not divide T or without pooling, or an input that ``forward`` does not take.

        Source: timm ``forward_intermediates``; "Generative Pretraining from Pixels" (Chen et al., 2020), section 2.3.
        """
        body: Any = self.base_model
        layers = _layers(indices, len(body.h), embedding)
        bands = _bands(input_ids, pool, bands)
        taken = forwards.Taken(layers, layers[-1] if stop_early else len(body.h), norm, bands, not intermediates_only)
        states = forwards.run(body, input_ids, taken, dtype=dtype)
        if states is None:
            last, found = _by_blocks(body, input_ids, taken)
        else:  # each in memory of its own: one that is kept does not keep the others
            assert states.taken is not None
            last, found = states.last, [state.clone() for state in states.taken]
        shape = input_ids.shape[:-1]  # (T,) ids give results without B
        features = [state.reshape(*shape, *_shape(state, bands)) for state in found]
        return features if last is None else (last.view(*shape, *last.shape[1:]), features)


def _by_blocks(body: Any, input_ids: Tensor, taken: forwards.Taken) -> tuple[Tensor | None, list[Tensor]]:
    """As the compiled forward pass does it: the last states, where they are wanted, and what is taken."""
    hidden = body._embed(body._tokens(input_ids, None), 0, None, None)  # (B, T, n_embd)
    found: list[Tensor] = []
    for layer in range(taken.run + 1):
        if layer > 0:
            hidden = body.h[layer - 1](hidden)[0]  # (B, T, n_embd)
        if layer in taken.layers:
            following = body.h[layer].ln_1 if layer < len(body.h) else body.ln_f
            found.append(_pooled(_normed(following, hidden) if taken.normed else hidden, taken.bands))
    return body.ln_f(hidden) if taken.last else None, found


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    """Of a block that does not run, or not yet, so that FSDP has not put the parts of its weight together."""
    if hasattr(weight := norm.weight, "full_tensor"):
        return torch.func.functional_call(norm, {"weight": weight.full_tensor()}, (hidden,))
    return norm(hidden)


def _pooled(states: Tensor, bands: int) -> Tensor:
    """(B, T, n_embd) to (B, bands, n_embd), or as they are."""
    if bands == 0:
        return states
    wide = torch.promote_types(states.dtype, torch.float32)
    return states.unflatten(1, (bands, -1)).mean(dim=2, dtype=wide)  # (B, bands, n_embd)


def _shape(states: Tensor, bands: int) -> tuple[int, ...]:
    """Of an image's features."""
    positions = () if bands == 1 else (bands or states.shape[1],)
    return (*positions, states.shape[-1])


def _layers(indices: int | Sequence[int] | None, blocks: int, embedding: bool) -> list[int]:
    """How many blocks stand before each of the features: the paper's layers, ascending."""
    given: Any = getattr(indices, "tolist", lambda: indices)()  # numpy's, torch's
    if given is None:
        taken = list(range(blocks))
    elif isinstance(given, Sequence):
        taken = [whole_number("indices", i, -blocks, blocks - 1) % blocks for i in given]
    else:
        taken = list(range(blocks - whole_number("indices", given, 1, blocks), blocks))
    layers = [0] * embedding + [i + 1 for i in taken]
    if not layers:
        raise ValueError("indices: none are given; want a block at least, or embedding=True")
    if any(before >= after for before, after in itertools.pairwise(layers)):
        raise ValueError(f"indices: expected ascending blocks, each once, got {shown(taken)}")
    return layers


def _bands(input_ids: Tensor, pool: str | None, bands: int) -> int:
    """Bands of positions, 0 where there is no pooling."""
    if pool not in ("mean", None):
        raise ValueError(f'pool is {shown(pool)}; want "mean" or None')
    bands = whole_number("bands", bands)
    if pool is None:
        if bands != 1:
            raise ValueError(f'bands is {bands} and pool is None; want pool="mean"')
        return 0
    length = input_ids.shape[-1] if isinstance(input_ids, Tensor) and input_ids.ndim else bands  # others: `_tokens`
    if length % bands or not length:
        raise ValueError(f"bands is {bands}; want a number that divides the {length} positions of input_ids")
    return bands
