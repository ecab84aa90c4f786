"""What code raises that is no `Exception`, such as pyo3's PanicException: a fault in an extension in Rust."""


class Panic(BaseException):
    """A fault that ``except Exception`` does not see."""
