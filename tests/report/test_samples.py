"""What a student learned from, in the report."""

import base64
import io
import json

from PIL import Image

from lfm.report import Run, Samples, render

TEXTS = ("Once upon a time <script>", "There was a cat & a dog.")


def picture():
    out = io.BytesIO()
    Image.new("L", (4, 4), 128).save(out, "PNG")
    return out.getvalue()


def test_a_picture_is_part_of_the_page_which_asks_nobody_for_it():
    page = render(Run("run", "1", samples=(Samples("student", picture(), facts={"confidence": 0.98}),)))
    coded = page.partition('src="data:image/png;base64,')[2].partition('"')[0]
    assert base64.b64decode(coded) == picture()
    assert "img-src data:" in page
    assert "confidence" in page
    assert "0.98" in page


def test_texts_are_shown_as_text():
    page = render(Run("run", "1", samples=(Samples("student", texts=TEXTS),)))
    assert "Once upon a time &lt;script&gt;" in page
    assert "<script>" not in page.partition('id="lfm-run"')[0].rpartition("<script")[0]
    payload = json.loads(page.partition('id="lfm-run">')[2].partition("</script>")[0])
    assert payload["samples"] == [{"step": "student", "texts": list(TEXTS), "facts": {}}]


def test_a_run_without_samples_has_no_such_section():
    assert "Made to learn from" not in render(Run("run", "1"))
