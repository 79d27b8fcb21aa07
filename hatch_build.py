"""The wheel carries the compiled data path beside its sources; without a C compiler it is a wheel of sources alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledWheel(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return  # a checkout is compiled by `make build`
        sys.path.insert(0, str(Path(self.root) / "devices"))
        from rayos_devices.build import BuildError, build

        try:
            folder = build()
        except BuildError as error:
            self.app.display_warning(f"{error}: the data path will run interpreted")
            return
        build_data["force_include"][str(folder)] = str(folder.relative_to(Path(self.root, "devices")))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
