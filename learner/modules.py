"""What a configuration changes in a module before any engine wraps it. Names, methods and state dicts stay as they are, and
so does the class as ``isinstance`` sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learner.main import EngineConfig


def prepare_module(module: nn.Module, config: EngineConfig) -> None:
    """Activation checkpointing and torch.compile, in place; a second call changes nothing.

    Checkpointed is each element of an ``nn.ModuleList``, wherever the list is; in a module without one, each direct child.
    Compiled is each direct child, and each element of one that is an ``nn.ModuleList``.
    """
    if config.activation_checkpointing:
        for layer in _listed(module) or list(module.children()):
            cls: Any = type(layer)
            layer.__class__ = _checkpointed(cls)
    if config.compile:
        for child in module.children():
            for layer in child if isinstance(child, nn.ModuleList) else (child,):
                if layer._compiled_call_impl is None:
                    layer._compiled_call_impl = functools.partial(_compiled(repr(layer)), layer)


def _listed(module: nn.Module) -> list[nn.Module]:
    """Elements of the outermost module lists."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _listed(child)
    return found


@functools.cache
def _compiled(structure: str) -> Callable[..., Any]:
    """The compiled call of layers of one structure, whose compilations they share.

    ``Module.compile`` leaves classes of torch.nn (a Sequential) as they are without a word: torch compiles no frame of its own
    files, so this one is the frame. And it compiles a function for 8 kinds of layer at most: so each structure has its own.
    """

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return torch.compile(call)


@functools.cache
def _checkpointed(cls: Any) -> Any:
    """The class with a forward that keeps its inputs only and is run again in the backward pass.

    A class, not a wrapped method of one module: a copy of the module (the moving average) must call itself, not the original.
    """
    if getattr(cls, "computes_again", False):
        return cls

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        return checkpoint(cls.forward, self, *args, use_reentrant=False, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "computes_again": True, "__module__": cls.__module__})
