"""What checks the shapes and types of mmlens' annotations while the tests run."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
