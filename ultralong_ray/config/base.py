"""What every section of the recipe is: immutable, strict, and able to say what of it changes a result."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that does not change what a stage computes: left out of fingerprints."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def server_address(value: str, section: str) -> str:
    """The `base_url` of a section that names a server, without a slash at its end. Raises ValueError in words."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{section}.base_url {value!r} is no address; give one like https://host:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"{section}.base_url must not carry a user name, a password or a query, which would end up in files; put "
            f"the key into the environment variable that {section}.api_key_env names"
        )
    return value.rstrip("/")


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def fingerprint_fields(self) -> dict[str, Any]:
        """JSON-ready dict of the fields that change what is computed."""
        fields: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("operational")):
                fields[name] = _plain(getattr(self, name))
        return fields


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.fingerprint_fields()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
