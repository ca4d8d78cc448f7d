"""Building a store from many structures, and inspecting it."""
