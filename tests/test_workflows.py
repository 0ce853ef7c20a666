"""The example workflows in ComfyUI's page."""

import pytest

from montage.workshop.browser import run_node


@pytest.mark.slow
def test_every_workflow_opens_and_is_its_api_twin(browser, page_server):
    run_node("workflows.test.js", {**browser, "MONTAGE_COMFY": page_server.url})
