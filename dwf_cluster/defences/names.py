"""The name of a defence as a field of settings, and as it is stored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from dwf_cluster.defences.registry import OWN_MODEL, recipe_names
from dwf_cluster.settings import OneOf

STORED_OWN_MODEL = "given"
"""The defence `OWN_MODEL` in `experiment.json` and in signatures, since version 0.2: renamed there, finished
measurements would have another folder."""


def _or_own_model(name: Any, check: ValidatorFunctionWrapHandler) -> str:
    return OWN_MODEL if name in (OWN_MODEL, STORED_OWN_MODEL) else str(check(name))


def _stored(name: str) -> str:
    return STORED_OWN_MODEL if name == OWN_MODEL else name


DefenceName = Annotated[str, OneOf(recipe_names), WrapValidator(_or_own_model), PlainSerializer(_stored)]
"""One of `recipe_names`, or `OWN_MODEL`."""
