"""Other libraries' interfaces on top of fastmto: `torchjd`, `libmtl`, `weight_methods`.

Import the module that you need; `torchjd` and `libmtl` raise ImportError, naming the extra to
install, where their library is missing.
"""

from __future__ import annotations
