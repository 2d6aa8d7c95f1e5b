"""Plain LoRAs from adapters of other kinds, exact where the rank is finite, with the error measured."""
