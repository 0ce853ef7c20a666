"""The example workflows in ComfyUI's page."""

import pytest
from test_browser import browser, run_node, server  # noqa: F401  fixtures


@pytest.mark.slow
def test_every_workflow_opens_and_is_its_api_twin(browser, server):  # noqa: F811
    run_node("workflows.test.js", {**browser, "MONTAGE_COMFY": server.url})
