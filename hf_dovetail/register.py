"""Registration with transformers, without importing it: each part is put in place when its module is imported.

`import hf_dovetail` must cost next to nothing and work in any order with `import transformers`. So a finder
waits for the four modules of transformers that take part; those that are there already are served at once.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

_originals: dict[str, Callable] = {}


def _is_draft(assistant: Any) -> bool:
    """Whether an assistant is a Dovetail draft; if nothing has imported `modeling`, none can be."""
    draft_class = getattr(sys.modules.get("hf_dovetail.modeling"), "DovetailAssistantModel", None)
    return draft_class is not None and isinstance(assistant, draft_class)


def _check_not_wrapped(assistant: Any) -> None:
    """Refuse a draft inside another module, such as `torch.compile` and PEFT make; transformers takes it for an LM.

    Raises:
        ValueError: saying what to pass.
    """
    for wrapped in ("_orig_mod", "base_model"):
        inner = getattr(assistant, wrapped, None)
        if _is_draft(inner) or _is_draft(getattr(inner, "model", None)):
            raise ValueError(
                f"assistant_model is a {type(assistant).__name__} around a Dovetail draft; pass the draft itself"
            )


def _patch_generation(module: ModuleType) -> None:
    """Route `generate` calls whose assistant is a Dovetail draft; all others reach the original functions."""
    mixin = module.GenerationMixin
    decoding, validate = mixin._assisted_decoding, mixin._validate_generation_mode
    _originals.update(_assisted_decoding=decoding, _validate_generation_mode=validate)

    @wraps(decoding)  # generate() reads the signature
    def assisted_decoding(self: Any, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if not _is_draft(assistant_model):
            return decoding(self, *args, assistant_model=assistant_model, **kwargs)
        from .plugin import dovetail_decoding

        return dovetail_decoding(self, *args, assistant_model=assistant_model, **kwargs)

    @wraps(validate)
    def validate_generation_mode(self: Any, generation_mode: Any, generation_config: Any, mode_kwargs: dict) -> None:
        assistant = mode_kwargs.get("assistant_model")
        if _is_draft(assistant):
            from .plugin.requests import check_request

            check_request(self, assistant, generation_mode, generation_config)
            if assistant.config.vocab_size != self.config.get_text_config().vocab_size:  # padding, which is no other
                mode_kwargs = {name: given for name, given in mode_kwargs.items() if name != "assistant_model"}
        elif assistant is not None:
            from .formats import check_not_misread

            _check_not_wrapped(assistant)
            check_not_misread(assistant)
        validate(self, generation_mode, generation_config, mode_kwargs)

    mixin._assisted_decoding, mixin._validate_generation_mode = assisted_decoding, validate_generation_mode


def _restore_generation(module: ModuleType) -> None:
    for name in ("_assisted_decoding", "_validate_generation_mode"):
        setattr(module.GenerationMixin, name, _originals.pop(name))


def _patch_pipelines(module: ModuleType) -> None:
    """Let a pipeline take the path of a published draft, whose files look like a Llama's; all else goes on as before.

    A draft has its target's tokenizer, whatever special tokens its own files name: others are refused by `generate`.
    """
    load = _originals["load_assistant_model"] = module.load_assistant_model

    @wraps(load)
    def load_assistant_model(model: Any, assistant_model: Any, assistant_tokenizer: Any) -> tuple[Any, Any]:
        if isinstance(assistant_model, str) and model.can_generate():
            from .formats import published_format

            if published_format(assistant_model) is not None:
                from .modeling import DovetailAssistantModel

                assistant_model = DovetailAssistantModel.from_pretrained(assistant_model, dtype=model.dtype)
        if _is_draft(assistant_model) and model.can_generate():
            return assistant_model, None
        return load(model, assistant_model, assistant_tokenizer)

    module.load_assistant_model = load_assistant_model


def _restore_pipelines(module: ModuleType) -> None:
    module.load_assistant_model = _originals.pop("load_assistant_model")


def _add_config(module: ModuleType) -> None:
    from .config import DovetailConfig

    module.CONFIG_MAPPING.register(DovetailConfig.model_type, DovetailConfig, exist_ok=True)


def _remove_config(module: ModuleType) -> None:
    module.CONFIG_MAPPING._extra_content.pop("dovetail", None)


def _add_model(module: ModuleType) -> None:
    from . import modeling
    from .config import DovetailConfig

    if hasattr(modeling, "DovetailAssistantModel"):  # else `modeling` is being imported, and calls `model_is_ready`
        module.MODEL_FOR_CAUSAL_LM_MAPPING.register(DovetailConfig, modeling.DovetailAssistantModel, exist_ok=True)


def model_is_ready() -> None:
    """Add the model to the Auto classes, if it was `hf_dovetail.modeling` itself that imported them."""
    module = sys.modules.get("transformers.models.auto.modeling_auto")
    if module is not None and _finder in sys.meta_path:
        _add_model(module)


def _remove_model(module: ModuleType) -> None:
    from .config import DovetailConfig

    module.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(DovetailConfig, None)


_PARTS: dict[str, tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]] = {
    "transformers.generation.utils": (_patch_generation, _restore_generation),
    "transformers.models.auto.configuration_auto": (_add_config, _remove_config),
    "transformers.models.auto.modeling_auto": (_add_model, _remove_model),
    "transformers.pipelines.base": (_patch_pipelines, _restore_pipelines),
}


class _Loader(importlib.abc.Loader):
    """Runs a module's own loader, then puts Dovetail's part in place."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if _finder in sys.meta_path:
            _PARTS[module.__name__][0](module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that take part as everyone else would, and wraps their loaders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PARTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()


def register() -> None:
    """Make `generate(assistant_model=draft)` and the Auto classes know Dovetail. Done by `import hf_dovetail`."""
    if _finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _finder)
    for name, (install, _) in _PARTS.items():
        if name in sys.modules:
            install(sys.modules[name])


def unregister() -> None:
    """Restore transformers fully, as if `hf_dovetail` had never been imported."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name, (_, remove) in _PARTS.items():
        if name in sys.modules:
            remove(sys.modules[name])
