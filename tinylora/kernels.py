"""Where the kernels live.

In a checkout they lie in ../kernels, in a wheel in the folder of this name beside this file.
That folder must never hold an __init__.py: a package called `kernels` on sys.path hides Hugging
Face's `kernels`, and `import transformers` then fails.
"""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
