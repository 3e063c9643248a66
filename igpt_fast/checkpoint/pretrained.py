"""``from_pretrained`` and ``save_pretrained``: transformers' folders, on this machine or on the hub.

A checkpoint is refused before the model is built: the names and shapes its files list are compared with what
its configuration claims, so that a wrong ``config.json`` cannot make the model eat the memory. Each weight is
then read, checked and copied on its own: the peak is one model and its largest tensor, and the loaded model
does not depend on the files any more.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from igpt_fast import files
from igpt_fast.checkpoint import tensors as weights
from igpt_fast.checkpoint.names import _HEADS, _PREFIX, plain_names, trunk_shapes
from igpt_fast.checkpoint.tensors import StoredTensor
from igpt_fast.checks import dtype_name
from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import listed, printable, shown

CONFIG = "config.json"

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_NEW_ELEMENTS = 1 << 26  # of a head that is not in the file and larger than the file

# Files of weights by their names, whoever wrote them; and those that the others hang on.
_WEIGHTS = re.compile(
    r"(?:model(?:-\d{5}-of-\d{5})?\.safetensors|pytorch_model(?:-\d{5}-of-\d{5})?\.bin)(?:\.index\.json)?"
)
_MAIN = (weights.SAFETENSORS_INDEX, weights.SAFETENSORS, weights.PICKLE_INDEX, weights.PICKLE)

M = TypeVar("M", bound="PretrainedMixin")


class PretrainedMixin(nn.Module):
    """``from_pretrained`` and ``save_pretrained`` for the model classes."""

    config: ImageGPTConfig
    # Weights that from_pretrained did not find and made up, as it warned: a head. () for any other model.
    newly_initialized: tuple[str, ...] = ()
    # What from_pretrained was given; "" for a model made from a configuration.
    name_or_path: str = ""

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_path: str | os.PathLike[str],
        *,
        config: ImageGPTConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        torch_dtype: torch.dtype | str | None = None,
        low_cpu_mem_usage: bool | None = None,
        output_loading_info: bool = False,
        **config_overrides: Any,
    ) -> M:
        """Loads a model, in eval mode, from a folder or from the hub.

        A checkpoint of another of the three classes is fine: its head is dropped, and a head it lacks is newly
        initialised, with a warning; ``model.newly_initialized`` names its weights.

        Args:
            name_or_path: A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``
                (single or sharded), or a hub name such as ``"openai/imagegpt-small"``.
            config: Used instead of ``config.json``.
            dtype: Of the loaded parameters: float32, float16, bfloat16 or float64, as a dtype or its name.
                ``None`` and ``"auto"``, as in transformers 5: the configuration's ``dtype`` entry, and
                where it has none, that of the stored weights.
            device: Where to put them; the CPU by default.
            revision, cache_dir, local_files_only, token, subfolder: As in
                ``huggingface_hub.hf_hub_download``.
            strict: Refuse tensors that the model does not know; ``False`` warns.
            ignore_mismatched_sizes: Newly initialise a head of another size, with a warning.
            use_safetensors: ``True`` only safetensors, ``False`` only ``.bin``, ``None`` either.
            torch_dtype: Older name of ``dtype``.
            low_cpu_mem_usage: Accepted for transformers' sake; a load never takes more than it must.
            output_loading_info: ``True`` is refused: what is missing or unknown raises or warns, and
                ``model.newly_initialized`` names what is new.
            config_overrides: Fields of the configuration, such as ``num_labels=10``.

        Raises:
            FileNotFoundError: No such folder, repository or file, or no network.
            TypeError: A keyword that is not a field of the configuration.
            ValueError: A file is damaged, malicious, or does not fit the configuration (a missing, unknown,
                misshapen, integer or non-finite weight); the message names file and reason. Or
                ``output_loading_info=True``.
        """
        if output_loading_info:
            raise ValueError("from_pretrained: output_loading_info is not supported; see model.newly_initialized")
        if dtype is not None and torch_dtype is not None:
            raise TypeError("from_pretrained: give dtype or its older name torch_dtype, not both")
        wanted = _dtype(dtype if dtype is not None else torch_dtype, "from_pretrained: dtype")
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        where |= {"token": token, "subfolder": subfolder}
        config = _load_config(name_or_path, config, config_overrides, where)
        stored = weights.open_weights(name_or_path, use_safetensors=use_safetensors, **where)
        tensors = plain_names(stored)
        _check_trunk(tensors, config, stored.source)
        wanted = wanted or _dtype(config.extra.get("dtype"), f"{stored.source.parent / CONFIG}: dtype")
        wanted = wanted or cast(torch.dtype, tensors["wte.weight"].dtype)  # the token embedding: every checkpoint's
        with torch.device("meta"), Uninitialised():  # names and shapes only: no memory, no random numbers
            model = cls(config)
        state, new = _state_dict(model, tensors, stored.source, wanted, device, strict, ignore_mismatched_sizes)
        model.load_state_dict(state, strict=False, assign=True)
        if left := [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]:
            raise RuntimeError(f"{cls.__name__}: no checkpoint can fill {listed(left)}")
        model.newly_initialized = new
        config.extra["dtype"] = dtype_name(wanted)
        model.name_or_path = os.fspath(name_or_path)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
    ) -> None:
        """Writes ``config.json`` and safetensors, in the form of transformers.

        Every file is whole before the first one gets its name. The folder holds one model afterwards: other
        weights in it, ``pytorch_model.bin`` too, are removed, and those that ``from_pretrained`` could take
        for this model's before the first of these gets its name.

        Args:
            directory: Made if it does not exist.
            max_shard_size: Weights beyond this are split over several files; bytes, or such as ``"200MB"``.
            state_dict: Saved instead of the model's own, such as averaged weights; same names.
            safe_serialization: ``False`` is refused: no pickles are written.
            is_main_process: ``False`` writes nothing, for all but one of the processes of a training run.

        Raises:
            OSError: The folder or a file cannot be written.
            ValueError: A bad ``max_shard_size``; ``safe_serialization=False``; names in ``state_dict`` that are
                not the model's.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError(f"save_pretrained: max_shard_size must be positive, got {max_shard_size}")
        if not safe_serialization:
            raise ValueError("save_pretrained: safe_serialization=False is not supported; no pickles are written")
        if not is_main_process:
            return
        own = self.state_dict()
        given = own if state_dict is None else state_dict
        state = {name: value.detach().contiguous() for name, value in given.items()}
        if differing := state.keys() ^ own.keys():
            raise ValueError(f"save_pretrained: state_dict differs from the model in {listed(differing)}")
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
        extra = {**self.config.extra, "architectures": [type(self).__name__], "dtype": dtype_name(dtype)}
        texts = {CONFIG: dataclasses.replace(self.config, extra=extra).to_json_string()}
        if split.is_sharded:
            total = sum(value.numel() for value in state.values())
            metadata = {**split.metadata, "total_parameters": total}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            texts = {weights.SAFETENSORS_INDEX: json.dumps(index, indent=2, sort_keys=True) + "\n", **texts}
        names = [*split.filename_to_tensors, *texts]
        before = {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and not path.is_dir()}
        # The other layouts' main files, and an index of shards that are about to change.
        outdated = [folder / name for name in _MAIN if name in before and name != weights.SAFETENSORS]
        outdated += [folder / weights.SAFETENSORS] if split.is_sharded and weights.SAFETENSORS in before else []
        with files.replacing_together([folder / name for name in names], outdated=outdated) as partials:
            for name, partial in zip(names, partials, strict=True):
                if name in texts:
                    partial.write_text(texts[name], encoding="utf-8")
                else:
                    shard = {key: state[key] for key in split.filename_to_tensors[name]}
                    try:
                        save_file(shard, partial, metadata={"format": "pt"})
                    except SafetensorError as error:  # a full disk, in the library's own class
                        raise _os_error(error, partial) from error
        for name in before - set(names):
            (folder / name).unlink(missing_ok=True)


def _os_error(error: Exception, path: Path) -> OSError:
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else errno.EIO
    return OSError(number, os.strerror(number) if told else files.first_line(error), str(path))


def _load_config(
    name_or_path: str | os.PathLike[str],
    config: ImageGPTConfig | None,
    overrides: dict[str, Any],
    where: dict[str, Any],
) -> ImageGPTConfig:
    known = {field.name for field in dataclasses.fields(ImageGPTConfig)} - {"extra"}
    if unknown := overrides.keys() - known - ImageGPTConfig.attribute_map.keys():
        raise TypeError(f"from_pretrained: neither arguments nor fields of the configuration: {listed(unknown)}")
    if config is not None:
        return ImageGPTConfig.from_dict(ImageGPTConfig.of(config, "from_pretrained").to_dict(), **overrides)
    path = files.find_file(name_or_path, CONFIG, **where)
    assert path is not None
    return ImageGPTConfig.from_json_file(path, **overrides)


def _dtype(value: Any, what: str) -> torch.dtype | None:
    """``None`` for ``None`` and ``"auto"``."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    dtype = _DTYPES.get(dtype_name(value)) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
        raise ValueError(f"{what} must be 'auto' or one of {', '.join(_DTYPES)}, got {shown(value)}")
    return dtype


def _check_trunk(tensors: dict[str, StoredTensor], config: ImageGPTConfig, source: Path) -> None:
    missing: list[str] = []
    for name, shape in trunk_shapes(config):
        if name in tensors:
            _check(name, tensors[name], shape)
        else:
            missing.append(name)
            if len(missing) > 8:
                break
    if missing:
        more = " and more" if len(missing) > 8 else ""
        layers = {int(name.split(".")[1]) for name in tensors if re.match(r"h\.\d{1,9}\.", name)}
        raise ValueError(
            f"{source}: lacks {', '.join(missing[:8])}{more}"
            f" (layers in the file: {len(layers)}, in the configuration: {config.n_layer})"
        )


def _check(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor.dtype, torch.dtype):
        raise ValueError(f"{tensor.file}: {name}: dtype {printable(tensor.dtype)}; wanted one of {', '.join(_DTYPES)}")
    if tensor.shape != shape:
        raise ValueError(f"{tensor.file}: {name}: shape {shown(tensor.shape)}, the configuration wants {shape}")


class Uninitialised(TorchFunctionMode):
    """Leaves random numbers out: on the meta device they load torch's compiler, 80 MB and a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _state_dict(
    model: PretrainedMixin,
    tensors: dict[str, StoredTensor],
    source: Path,
    dtype: torch.dtype,
    device: torch.device | str | None,
    strict: bool,
    ignore_mismatched_sizes: bool,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's state, read and checked, and what of it is new; ``tensors`` is emptied on the way."""
    wanted = {name.removeprefix(_PREFIX): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    if unknown := tensors.keys() - wanted.keys() - set(_HEADS):
        message = f"{source}: holds tensors that {type(model).__name__} does not know: {listed(unknown)}"
        if strict:
            raise ValueError(f"{message} (strict=False drops them)")
        warnings.warn(f"{message}: dropped", stacklevel=3)
    new = []
    for plain, (_, shape) in wanted.items():
        if plain in _HEADS and plain in tensors and ignore_mismatched_sizes and tensors[plain].shape != shape:
            del tensors[plain]
        if plain in tensors:
            _check(plain, tensors[plain], shape)
        else:
            new.append(plain)
    if missing := set(new) - set(_HEADS):
        raise ValueError(f"{source}: lacks {listed(missing)}")
    limit = max(_MAX_NEW_ELEMENTS, sum(math.prod(tensor.shape) for tensor in tensors.values()))
    for plain in new:
        if math.prod(wanted[plain][1]) > limit:
            raise ValueError(f"{source}: lacks {plain}, and the configuration claims {wanted[plain][1]} for it")
    if new:
        warnings.warn(f"{source}: lacks {listed(new)}: newly initialised; train it before use", stacklevel=3)
    state = {}
    for plain, (name, shape) in wanted.items():
        if plain in tensors:
            state[name] = _read(plain, tensors.pop(plain), dtype, device)
        else:
            std = model.config.initializer_range
            state[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)
    return state, tuple(wanted[plain][0] for plain in new)


def _read(name: str, tensor: StoredTensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """A copy of a stored tensor, so that nothing keeps the file mapped; finite."""
    source = tensor.read()
    if tuple(source.shape) != tensor.shape or source.dtype != tensor.dtype:
        raise ValueError(f"{tensor.file}: {name}: changed while it was read")
    if not _is_finite(source):
        raise ValueError(f"{tensor.file}: {name}: holds NaN or infinity")
    value = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(source)
    if torch.finfo(dtype).max < torch.finfo(source.dtype).max and not _is_finite(value):
        raise ValueError(f"{tensor.file}: {name}: holds values too large for {dtype_name(dtype)}")
    return value


def _is_finite(value: Tensor) -> bool:
    # NaN passes through aminmax, which needs no temporary and is some 20 times as fast as isfinite().all().
    low, high = value.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
