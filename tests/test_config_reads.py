"""Which fields of the config a modeling file reads."""

from portkit.analysis.config_reads import config_reads

SOURCE = """
class Norm(nn.Module):
    def __init__(self, config, eps):
        text = config.text_config
        self.scale = config.scale * text.cap
        self.window = getattr(self.config, "window", None)
        if hasattr(config, "extra"):
            config.written = 1
        other.not_a_field


def helper(config):
    return config.late
"""


def test_fields_with_the_class_and_line_of_their_first_read() -> None:
    found = config_reads(SOURCE)
    assert {name: (read.cls, read.line) for name, read in found.items()} == {
        "scale": ("Norm", 5),
        "cap": ("Norm", 5),
        "window": ("Norm", 6),
        "extra": ("Norm", 7),
        "late": ("", 13),
    }
