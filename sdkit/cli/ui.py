"""The command that serves the page: ``sdkit ui``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sdkit.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    EmbeddingOption,
    GraphsOption,
    ModelOption,
    ModelOptions,
    PredictionOption,
    TextEncoderOption,
    VaeOption,
    ZeroSnrOption,
)
from sdkit.cli.output import check_writable
from sdkit.errors import SDKitError

NetworksOption = Annotated[
    Path | None, typer.Option(help="A folder of LoRAs and hypernetworks, a slider each.", metavar="FOLDER")
]
FolderOption = Annotated[Path, typer.Option(help="The folder that pictures are written to.", metavar="FOLDER")]
PortOption = Annotated[
    int | None, typer.Option(help="Default: the first free one from 7860 on.", min=1, max=65535, metavar="N")
]


def ui(
    model: ModelOption = "tabletop",
    networks: NetworksOption = None,
    output: FolderOption = Path("out"),
    port: PortOption = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    embedding: EmbeddingOption = (),  # type: ignore[assignment]  # typer gives a list
    prediction: PredictionOption = None,
    zero_snr: ZeroSnrOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    graphs: GraphsOption = None,
) -> None:
    """Draw in the browser, on a page that this machine alone can see."""
    try:
        import gradio
    except ImportError:
        raise SDKitError("sdkit ui: gradio is missing: pip install 'sdkit-triton[ui]'") from None
    from sdkit.ui.page import serve
    from sdkit.ui.studio import Studio, find_networks

    del gradio
    check_writable(output, is_folder=True)
    known = find_networks(networks)
    options = ModelOptions(
        model, vae, list(embedding), device, dtype, backend, graphs, prediction, zero_snr, text_encoder
    )
    none: Mapping[str, list[str]] = {}
    page = serve(Studio(lambda: options.load(none), options.parts(none), known, output), port, browser)
    print(f"{page.local_url}  pictures go to {output}/; Ctrl-C ends it", flush=True)
    page.block_thread()
