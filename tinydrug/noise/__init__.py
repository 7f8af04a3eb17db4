"""Noise as a value: sites, doses, the schedule of a run, and its text, table and file forms."""

from tinydrug.noise.dose import Dose, Effect, parse_dose
from tinydrug.noise.drift import COUNTED, Term
from tinydrug.noise.files import load_schedule, save_schedule
from tinydrug.noise.profile import Profile
from tinydrug.noise.schedule import SOBER, Schedule
from tinydrug.noise.sites import SITES, Site
from tinydrug.noise.where import Depth, Layers

__all__ = [
    "COUNTED",
    "SITES",
    "SOBER",
    "Depth",
    "Dose",
    "Effect",
    "Layers",
    "Profile",
    "Schedule",
    "Site",
    "Term",
    "load_schedule",
    "parse_dose",
    "save_schedule",
]
