"""Where load comes from: two continents, by the coordinates that a trusted proxy would send."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class City:
    name: str
    latitude: float
    longitude: float

    @property
    def headers(self) -> dict[str, str]:
        return {"cf-iplatitude": str(self.latitude), "cf-iplongitude": str(self.longitude)}


EUROPE = "Europe"
NORTH_AMERICA = "North America"
CITIES = {
    EUROPE: (
        City(name="Berlin", latitude=52.52, longitude=13.41),
        City(name="Dublin", latitude=53.35, longitude=-6.26),
        City(name="London", latitude=51.51, longitude=-0.13),
        City(name="Madrid", latitude=40.42, longitude=-3.70),
        City(name="Paris", latitude=48.86, longitude=2.35),
        City(name="Rome", latitude=41.90, longitude=12.50),
        City(name="Stockholm", latitude=59.33, longitude=18.07),
    ),
    NORTH_AMERICA: (
        City(name="Atlanta", latitude=33.75, longitude=-84.39),
        City(name="Boston", latitude=42.36, longitude=-71.06),
        City(name="Chicago", latitude=41.88, longitude=-87.63),
        City(name="Denver", latitude=39.74, longitude=-104.99),
        City(name="Houston", latitude=29.76, longitude=-95.37),
        City(name="New York", latitude=40.71, longitude=-74.01),
        City(name="Toronto", latitude=43.65, longitude=-79.38),
    ),
}


def city(continent: str, seed: int) -> City:
    return random.Random(seed).choice(CITIES[continent])
