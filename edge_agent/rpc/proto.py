"""Message classes from a .proto file, without a compiler and without generated code to keep in step.

They live in a descriptor pool of their own: protobuf's default one takes one `inference.ModelInferRequest` a process,
and a program may have NVIDIA's client in it, too. Understood are proto3 messages, enumerations, oneofs and maps;
a service is passed over.
"""

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TOKENS = re.compile(r"//[^\n]*|(\"[^\"]*\"|[\w.]+|[^\w\s])")
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}


def build_messages(name: str, text: str) -> dict[str, Any]:
    """Return the message classes by name.

    Args:
        name: Of the file.
        text: The .proto; one of our own, so that what is not understood raises whatever comes of it.
    """
    file = descriptor_pb2.FileDescriptorProto(name=name, syntax="proto3")
    tokens = (found[1] for found in _TOKENS.finditer(text) if found[1])
    for word in tokens:
        match word:
            case "package":
                file.package = next(tokens)
            case "message":
                _parse_message(tokens, file.message_type.add(name=next(tokens)))
            case "enum":
                _parse_enum(tokens, file.enum_type.add(name=next(tokens)))
            case "service":
                _skip_block(tokens)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}")) for name in names
    }


def _parse_message(tokens: Iterator[str], message: Any) -> None:
    _expect(tokens, "{")
    while (word := next(tokens)) != "}":
        match word:
            case "message":
                _parse_message(tokens, message.nested_type.add(name=next(tokens)))
            case "oneof":
                message.oneof_decl.add(name=next(tokens))
                _expect(tokens, "{")
                while (kind := next(tokens)) != "}":
                    _parse_field(tokens, kind, message).oneof_index = len(message.oneof_decl) - 1
            case "map":
                _parse_map(tokens, message)
            case "repeated":
                _parse_field(tokens, next(tokens), message).label = _Field.LABEL_REPEATED
            case _:
                _parse_field(tokens, word, message)


def _parse_field(tokens: Iterator[str], kind: str, message: Any) -> Any:
    field = message.field.add(name=next(tokens), label=_Field.LABEL_OPTIONAL)
    _expect(tokens, "=")
    field.number = int(next(tokens))
    _expect(tokens, ";")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind  # the pool finds out whether it is a message
    return field


def _parse_map(tokens: Iterator[str], message: Any) -> None:
    """Add a field that is a list of keys and values, as maps are on the wire."""
    _, key, _, value, _ = (next(tokens) for _ in range(5))  # < key , value >
    field = _parse_field(tokens, "", message)
    field.label = _Field.LABEL_REPEATED
    entry = message.nested_type.add(name=f"{field.name.title().replace('_', '')}Entry")
    entry.options.map_entry = True
    _parse_field(iter(("key", "=", "1", ";")), key, entry)
    _parse_field(iter(("value", "=", "2", ";")), value, entry)
    field.type_name = entry.name


def _parse_enum(tokens: Iterator[str], enum: Any) -> None:
    _expect(tokens, "{")
    while (word := next(tokens)) != "}":
        _expect(tokens, "=")
        enum.value.add(name=word, number=int(next(tokens)))
        _expect(tokens, ";")


def _skip_block(tokens: Iterator[str]) -> None:
    depth = 0
    for word in tokens:
        depth += {"{": 1, "}": -1}.get(word, 0)
        if word == "}" and depth == 0:
            return


def _expect(tokens: Iterator[str], expected: str) -> None:
    if (token := next(tokens)) != expected:
        raise ValueError(f"expected {expected!r}, got {token!r}")
