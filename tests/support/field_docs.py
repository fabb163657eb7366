"""Read the documentation of struct fields: the string below each field in the source."""

import ast
import inspect
import textwrap


def field_docs(cls: type) -> dict[str, str]:
    """Return the documentation of each field of a class, in order of the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(sentence))),
            ):
                found[name] = sentence
    return found
