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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from igpt_fast import files, keywords, kin
from igpt_fast.checkpoint import devices
from igpt_fast.checkpoint import tensors as weights
from igpt_fast.checkpoint.names import _HEADS, _PREFIX, plain_names, trunk_shapes
from igpt_fast.checkpoint.tensors import StoredTensor
from igpt_fast.checks import dtype_name
from igpt_fast.config import IMPLEMENTATIONS, ImageGPTConfig
from igpt_fast.files import listed, printable, shown

CONFIG = "config.json"
GENERATION = "generation_config.json"
OF_A_MODEL = ("preprocessor_config.json", GENERATION)  # beside its configuration and its weights

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_GENERATION_BYTES = 1 << 20
_MAX_NEW_ELEMENTS = 1 << 26  # of weights that are not in the file and larger than the file
_MAX_GROWTH = 16  # times that, or what is in the file: what a configuration of other sizes than the file's may claim

# Files of weights by their names, whoever wrote them; and those that the others hang on.
_WEIGHTS = re.compile(
    r"(?:model(?:-\d{5}-of-\d{5})?\.safetensors|pytorch_model(?:-\d{5}-of-\d{5})?\.bin)(?:\.index\.json)?"
)
_MAIN = (weights.SAFETENSORS_INDEX, weights.SAFETENSORS, weights.PICKLE_INDEX, weights.PICKLE)

M = TypeVar("M", bound="PretrainedMixin")
Writer = Callable[[Path], None]


class PretrainedMixin(nn.Module):
    """``from_pretrained`` and ``save_pretrained`` for the model classes."""

    config: ImageGPTConfig
    # The class that config.json names; "": this one.
    saved_as: str = ""
    # Weights that from_pretrained made up, as it warned: of a head that the files lack, or of another size than theirs.
    newly_initialized: tuple[str, ...] = ()
    # Of the files, what it had no place for; names and sizes, theirs and the model's, of what did not fit.
    _dropped: tuple[str, ...] = ()
    _mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    # What from_pretrained was given; "" for a model made from a configuration.
    name_or_path: str = ""
    # Of a generation_config.json, which is transformers'.
    _generation_file: dict[str, Any] | None = None

    @classmethod
    @keywords.also_called(name_or_path="pretrained_model_name_or_path")
    def from_pretrained(
        cls: type[M],
        name_or_path: str | os.PathLike[str] | None,
        *,
        config: ImageGPTConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
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
        device_map: Any = None,
        offload_folder: str | os.PathLike[str] | None = None,
        max_memory: dict[Any, Any] | None = None,
        **config_overrides: Any,
    ) -> Any:
        """Loads a model, in eval mode, from a folder or from the hub.

        A checkpoint of another of the three classes is fine: its head is dropped, and a head it lacks is newly
        initialised, with a warning; ``model.newly_initialized`` names its weights.

        Args:
            name_or_path: A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``
                (single or sharded), or a hub name such as ``"openai/imagegpt-small"``.
            config: Used instead of ``config.json``.
            state_dict: Weights, instead of files, which are checked and copied as those are; ``name_or_path`` may be
                ``None`` then, if there is a ``config``.
            dtype: Of the loaded parameters: float32, float16, bfloat16 or float64, as a dtype or its name.
                ``None`` and ``"auto"``, as in transformers 5: the configuration's ``dtype`` entry, and
                where it has none, that of the stored weights.
            device: Where to put them; the CPU by default.
            revision, cache_dir, local_files_only, token, subfolder: As in
                ``huggingface_hub.hf_hub_download``.
            strict: Refuse tensors that the model does not know; ``False`` warns.
            ignore_mismatched_sizes: Newly initialise weights of another size than the configuration's, with a warning
                that names them; ``model.newly_initialized`` has them.
            use_safetensors: ``True`` only safetensors, ``False`` only ``.bin``, ``None`` either.
            torch_dtype: Older name of ``dtype``.
            low_cpu_mem_usage: Accepted for transformers' sake; a load never takes more than it must.
            output_loading_info: Return a pair: the model, and transformers' dict of ``missing_keys`` and so on.
            device_map: A device; or where which module goes, as accelerate has it, which is needed then: a dict, or
                one of ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` and ``"sequential"``, with ``max_memory``; and
                ``offload_folder`` for what goes to the disk.
            config_overrides: Fields of the configuration, such as ``num_labels=10``; and what transformers'
                ``from_pretrained`` takes, where it asks for nothing (``trust_remote_code=False``).

        Raises:
            FileNotFoundError: No such folder, repository or file, or no network.
            ImportError: A ``device_map`` of several places, and accelerate is not installed.
            TypeError: A keyword that is not a field of the configuration.
            ValueError: A file is damaged, malicious, or does not fit the configuration (a missing, unknown,
                misshapen, integer or non-finite weight); the message names file and reason. Or a keyword asks for
                what is not offered; the message says what to do instead.
        """
        if device_map is not None or max_memory is not None:
            if device is not None:
                raise TypeError("from_pretrained: give device, or device_map and what goes with it, not both")
            device, device_map = devices.one_device(device_map)
        config_overrides = keywords.without_neutral("from_pretrained", config_overrides)
        if dtype is not None and torch_dtype is not None:
            raise TypeError("from_pretrained: give dtype or its older name torch_dtype, not both")
        wanted = _dtype(dtype if dtype is not None else torch_dtype, "from_pretrained: dtype")
        if name_or_path is None and (config is None or state_dict is None):
            raise ValueError("from_pretrained: name_or_path, or config and state_dict, are wanted")
        if device is None and torch.get_default_device().type == "meta":
            raise RuntimeError("from_pretrained: in a block of torch.device('meta') weights go nowhere; give device")
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        where |= {"token": token, "subfolder": subfolder}
        name = "" if name_or_path is None else os.fspath(name_or_path)
        config = _load_config(name, config, config_overrides, where)
        can_generate = name and cast(Any, cls).can_generate()
        generation = files.find_file(name, GENERATION, required=False, **where) if can_generate else None
        generated = None if generation is None else files.read_json(generation, _MAX_GENERATION_BYTES)
        keywords.check_settings(str(generation), generated or {})
        if state_dict is None:
            stored = weights.open_weights(name, use_safetensors=use_safetensors, **where)
        else:
            stored = weights.given_weights(state_dict)
        tensors = plain_names(stored)
        _check_trunk(tensors, config, stored.source, ignore_mismatched_sizes)
        wanted = wanted or _dtype(config.extra.get("dtype"), f"{stored.source.parent / CONFIG}: dtype")
        wanted = wanted or cast(torch.dtype, tensors["wte.weight"].dtype)  # the token embedding: every checkpoint's
        with torch.device("meta"), Uninitialised():  # names and shapes only: no memory, no random numbers
            model = cls(config).to(wanted)
        if device_map is not None:
            device_map = devices.places_of(model, device_map, max_memory, offload_folder)
        state, new = _state_dict(model, tensors, stored.source, wanted, device, strict, ignore_mismatched_sizes)
        model.load_state_dict(state, strict=False, assign=True)
        if left := [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]:
            raise RuntimeError(f"{cls.__name__}: no checkpoint can fill {listed(left)}")
        config.extra["dtype"] = dtype_name(wanted)
        model.newly_initialized, model.name_or_path, model._generation_file = new, name, generated
        model.eval()
        if device_map is not None:
            devices.dispatch(model, device_map, offload_folder)
        return (model, model._loading_info) if output_loading_info else model

    @keywords.also_called(directory="save_directory")
    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        save_function: Any = None,
        **neutral: Any,
    ) -> None:
        """Writes ``config.json`` and safetensors, in the form of transformers, and ``generation_config.json`` for
        a model that draws.

        Every file is whole before the first one gets its name. The folder holds one model afterwards: other
        weights in it, ``pytorch_model.bin`` too, are removed, and those that ``from_pretrained`` could take
        for this model's before the first of these gets its name.

        Args:
            directory: Made if it does not exist.
            max_shard_size: Weights beyond this are split over several files; bytes, or such as ``"200MB"``.
            state_dict: Saved instead of the model's own, such as averaged weights; same names.
            safe_serialization: ``False`` is refused: no pickles are written.
            is_main_process: ``False`` writes nothing, for all but one of the processes of a training run.
            save_function: For transformers' sake; files are written here, each whole.
            neutral: What transformers takes, where it asks for nothing (``push_to_hub=False``).

        Raises:
            OSError: The folder or a file cannot be written.
            ValueError: A bad ``max_shard_size``; ``safe_serialization=False``; names in ``state_dict`` that are
                not the model's.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError(f"save_pretrained: max_shard_size must be positive, got {max_shard_size}")
        if not safe_serialization:
            raise ValueError("save_pretrained: safe_serialization=False is not supported; no pickles are written")
        keywords.refuse("save_pretrained", keywords.without_neutral("save_pretrained", neutral))
        if not is_main_process:
            return
        own = self.state_dict()
        if state_dict is None and any(value.is_meta for value in own.values()):  # accelerate keeps them elsewhere
            modeling = kin.library("accelerate.utils.modeling", "save_pretrained")
            state_dict = modeling.get_state_dict_offloaded_model(self)
        given = own if state_dict is None else state_dict
        state = {name: value.detach().contiguous() for name, value in given.items()}
        if differing := state.keys() ^ own.keys():
            raise ValueError(f"save_pretrained: state_dict differs from the model in {listed(differing)}")
        shapes = dict(trunk_shapes(self.config))
        for name, value in state.items():
            want = shapes.get(name.removeprefix(_PREFIX), value.shape)
            if value.shape != want:  # such as after hf.linear_layers
                raise ValueError(f"save_pretrained: {name} is {tuple(value.shape)}, the configuration wants {want}")
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
        texts = {CONFIG: config_text(self.config, self.saved_as or type(self).__name__, dtype), **self._further_texts()}
        if split.is_sharded:
            total = sum(value.numel() for value in state.values())
            metadata = {**split.metadata, "total_parameters": total}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            texts = {weights.SAFETENSORS_INDEX: json.dumps(index, indent=2, sort_keys=True) + "\n", **texts}

        def shard(names: list[str]) -> Writer:
            return partial(_save_file, {name: state[name] for name in names})

        writers: dict[str, Writer] = {file: shard(names) for file, names in split.filename_to_tensors.items()}
        write_folder(Path(directory), writers, texts)

    def _further_texts(self) -> dict[str, str]:
        """What else ``save_pretrained`` writes: names of files and their content."""
        return {}

    @property
    def _loading_info(self) -> dict[str, Any]:
        sizes = set(self._mismatched)
        new = set(self.newly_initialized) - {name for name, *_ in sizes}
        return {
            "missing_keys": new,
            "unexpected_keys": set(self._dropped),
            "mismatched_keys": sizes,
            "error_msgs": [],
        }


def _save_file(state: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in the library's own class
        raise _os_error(error, path) from error


def write_folder(
    folder: Path, writers: Mapping[str, Writer], texts: Mapping[str, str], others: Sequence[str] = ()
) -> None:
    """Writes a model's files into a folder, all or none; the other weights that were in it are removed.

    Args:
        folder: Made if it does not exist, and gone again if the writing fails.
        writers: Files of weights, in transformers' names, and what writes them to the path that it is given.
        texts: The other files, an index of several weights' among them, and what is in them.
        others: Files that would be another model's, and are removed where they are not written.

    Raises:
        OSError: The folder or a file cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_folder(folder, writers, texts, others)
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _write_folder(folder: Path, writers: Mapping[str, Writer], texts: Mapping[str, str], others: Sequence[str]) -> None:
    names = [*writers, *texts]
    before = {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and not path.is_dir()}
    # The other layouts' main files, and an index of shards that are about to change; the file that is read first, last.
    order = sorted(_MAIN, key=weights.SAFETENSORS.__eq__)
    outdated = [
        folder / name for name in order if name in before and (name != weights.SAFETENSORS or name not in names)
    ]
    outdated += [folder / name for name in others if name not in names and (folder / name).exists()]
    with files.replacing_together([folder / name for name in names], outdated=outdated) as partials:
        for name, path in zip(names, partials, strict=True):
            if name in writers:
                writers[name](path)
            else:
                path.write_text(texts[name], encoding="utf-8")
    for name in before - set(names):
        (folder / name).unlink(missing_ok=True)


def _os_error(error: Exception, path: Path) -> OSError:
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else errno.EIO
    return OSError(number, os.strerror(number) if told else files.first_line(error), str(path))


def config_text(config: ImageGPTConfig, architecture: str, dtype: torch.dtype) -> str:
    """The ``config.json`` of a model of the class of that name, its weights stored in ``dtype``."""
    extra = {**config.extra, "architectures": [architecture], "dtype": dtype_name(dtype)}
    return dataclasses.replace(config, extra=extra).to_json_string()


def _load_config(
    name_or_path: str,
    config: ImageGPTConfig | None,
    overrides: dict[str, Any],
    where: dict[str, Any],
) -> ImageGPTConfig:
    known = {field.name for field in dataclasses.fields(ImageGPTConfig)} - {"extra"} | IMPLEMENTATIONS.keys()
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


# --- names, shapes, values ---------------------------------------------------------------------------------------


def _check_trunk(
    tensors: dict[str, StoredTensor], config: ImageGPTConfig, source: Path, ignore_mismatched_sizes: bool
) -> None:
    missing: list[str] = []
    for name, shape in trunk_shapes(config):
        if name in tensors:
            _check(name, tensors[name], tensors[name].shape if ignore_mismatched_sizes else shape)
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
        warnings.warn(f"{message}: dropped", stacklevel=4)
    model._dropped = tuple(sorted(tensors.keys() - wanted.keys()))
    new, told = [], []
    limit = max(_MAX_NEW_ELEMENTS, sum(math.prod(tensor.shape) for tensor in tensors.values()))
    for plain, (_, shape) in wanted.items():
        if ignore_mismatched_sizes and plain in tensors and tensors[plain].shape != shape:
            own = tensors.pop(plain).shape
            told.append(f"{plain} is {shown(own)} and not {shape}")
            model._mismatched += ((wanted[plain][0], own, shape),)
            new.append(plain)
        elif plain in tensors:
            _check(plain, tensors[plain], shape)
        elif plain in _HEADS:
            new.append(plain)
        else:
            raise ValueError(f"{source}: lacks {plain}")
    left = limit * (_MAX_GROWTH if told else 1)
    for plain in new:
        left -= math.prod(wanted[plain][1])
        if left < 0:
            raise ValueError(f"{source}: lacks {plain}, and the configuration claims {wanted[plain][1]} for it")
    if told:
        warnings.warn(f"{source}: {listed(told, 64)}: newly initialised; train before use", stacklevel=4)
    if lacking := set(new) - {text.partition(" ")[0] for text in told}:
        warnings.warn(f"{source}: lacks {listed(lacking)}: newly initialised; train it before use", stacklevel=4)
    state = {}
    for plain, (name, shape) in wanted.items():
        if plain in tensors:
            state[name] = _read(plain, tensors.pop(plain), dtype, device)
        else:
            state[name] = _initial(plain, torch.empty(shape, dtype=dtype, device=device), model.config)
    return state, tuple(wanted[plain][0] for plain in new)


def _initial(name: str, value: Tensor, config: ImageGPTConfig) -> Tensor:
    """A weight as the model's ``init_weights`` makes it."""
    if name.endswith(".bias"):
        return value.zero_()
    if re.search(r"\bln_\w+\.weight$", name):
        return value.fill_(1.0)
    residual = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
    return value.normal_(0.0, config.initializer_range / math.sqrt(residual))


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
