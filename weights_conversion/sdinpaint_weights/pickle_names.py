"""Which names in a pickle are harmless, and which make the file refused.

Nothing is ever imported or called, so the list of dangerous names protects no one here. It is a sign of trust: a
file that asks to run a program is not passed on as if it were a good one.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


DANGEROUS_MODULES = _names("""
    os posix posixpath nt ntpath _os sys subprocess _posixsubprocess pty popen2 commands platform shutil signal
    runpy importlib imp zipimport pkgutil pip setuptools distutils ensurepip venv
    code codeop codecs timeit profile cProfile pdb bdb trace doctest idlelib lib2to3 unittest inspect gc
    socket _socket ssl http urllib urllib2 requests httpx aiohttp ftplib smtplib telnetlib xmlrpc webbrowser antigravity
    ctypes _ctypes cffi mmap multiprocessing concurrent asyncio threading _thread
    pickle _pickle cPickle marshal shelve dill cloudpickle joblib jsonpickle operator _operator io _io
    torch.load torch.hub torch.jit torch.serialization torch.storage._load_from_bytes torch.package torch.ops
    torch.classes torch.multiprocessing torch.utils.cpp_extension torch.utils.model_zoo torch.utils.bottleneck
    torch.utils.collect_env torch._dynamo torch._inductor torch.testing
    numpy.load numpy.testing numpy.f2py numpy.distutils types.FunctionType types.LambdaType types.CodeType
""")
"""Modules, or single names in one, that a weights file has no use for."""

DANGEROUS_NAMES = _names("""
    eval exec execfile compile __import__ open getattr setattr delattr globals __globals__ __builtins__ system popen
""")
"""Names that are refused on the way through any object, e.g. `helper.os.system`."""

PLAIN_BUILTINS = _names("""
    bool int long float complex str unicode bytes bytearray list tuple dict set frozenset object slice range xrange
""")
"""All of the builtins that data needs; any other one is refused."""

HARMLESS = _names("""
    numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    _codecs.encode copyreg._reconstructor copy_reg._reconstructor torch.device
""")
"""Ordinary data that is no weight; not worth telling about."""


def is_dangerous(module: str, name: str) -> bool:
    """Whether a file that names this is refused."""
    if module in ("builtins", "__builtin__"):
        return name not in PLAIN_BUILTINS
    path, attributes = f"{module}.{name}".split("."), name.split(".")
    beginnings = {".".join(path[: end + 1]) for end in range(len(path))}
    through_an_object = len(attributes) > 1 and not set(attributes).isdisjoint(DANGEROUS_NAMES | DANGEROUS_MODULES)
    return through_an_object or not beginnings.isdisjoint(DANGEROUS_MODULES)


def is_harmless(module: str, name: str) -> bool:
    """Whether a name is ordinary data that needs no mention."""
    return module in ("builtins", "__builtin__") or f"{module}.{name}" in HARMLESS
