"""The exception tree: exit codes, and the way through a pickle."""

from __future__ import annotations

import inspect
import pickle

import pytest

from storage import errors

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_survives_pickling_with_its_message(cls: type[errors.Prox24Error]) -> None:
    error = cls("layers.3.q_proj, rows 0:128: not finite", 7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.args == error.args
    assert isinstance(again, errors.Prox24Error)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_exit_code_follows_from_the_place_in_the_tree(cls: type[errors.Prox24Error]) -> None:
    if issubclass(cls, errors.InputError):
        expected = 2
    elif cls is errors.RunInterrupted:
        expected = 130
    else:
        expected = 1
    assert cls.exit_code == expected


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_description_at_the_top_names_every_error(cls: type[errors.Prox24Error]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__
