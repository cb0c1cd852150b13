"""The dataset doctor: what is wrong with a folder of images, and what to do about it."""

from rexnet_lit.doctor.checkup import Checkup, Finding, render
from rexnet_lit.doctor.examine import check

__all__ = ["Checkup", "Finding", "check", "render"]
