"""vLLM never trains: no loss, no branch on `self.training`."""

from __future__ import annotations

import re

import libcst as cst

from portkit.lint.finding import Invalid, Valid
from portkit.lint.rule import Rule

LOSS = re.compile(
    r"^(loss_function|CrossEntropyLoss|cross_entropy|load_balancing_loss_func|\w*Loss)$"
)


class DropLoss(Rule):
    """Drop losses and branches for training.

    ## What it does
    Reports calls of loss functions and reads of `self.training`.

    ## Why vLLM wants it
    Labels are never given, so the code is dead; and a branch on `self.training` is one more
    thing that torch.compile must guard.

    ## Example
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)

    ## Use instead
        Nothing.

    ## Fix safety
    None: the variables that hold the loss go with it.

    ## References
    - vLLM guide, Basic model: 2. Make your code compatible with vLLM
    """

    VALID = [
        Valid("class A(nn.Module):\n    def forward(self, x):\n        return self.model(x)\n"),
        Valid("training = config.training_tokens\n"),
    ]
    INVALID = [
        Invalid(
            """
            class A(nn.Module):
                def forward(self, x, y):
                    return self.loss_function(x, y)
            """,
            line=3,
            names="loss_function",
        ),
        Invalid(
            """
            class A(nn.Module):
                def forward(self, x):
                    p = 0.1 if self.training else 0.0
            """,
            line=3,
            names="self.training",
        ),
    ]

    def visit_Call(self, node: cst.Call) -> None:
        name = self.source.dotted(node.func).rpartition(".")[2]
        if LOSS.match(name):
            self.report(node, f"`{name}` computes a loss: vLLM never trains, drop it.")

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if self.source.dotted(node) == "self.training":
            self.report(
                node, "`self.training` is always False in vLLM: keep the other branch only."
            )
