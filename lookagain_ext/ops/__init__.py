"""The four ops: routed attention, visual mass, routing and re-injection."""

from .reinjection import append_visual_
from .routed_attention import routed_attention
from .routing import select_visual_tokens
from .visual_mass import visual_mass

__all__ = ["append_visual_", "routed_attention", "select_visual_tokens", "visual_mass"]
