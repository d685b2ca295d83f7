"""All cases of the zoo, family by family."""

from zoo import dense, memory, numbers_, sequences, sound, structure, tables, vision

FAMILIES = {
    "vision": vision.CASES,
    "dense": dense.CASES,
    "sound": sound.CASES,
    "sequences": sequences.CASES,
    "tables": tables.CASES,
    "memory": memory.CASES,
    "structure": structure.CASES,
    "numbers": numbers_.CASES,
}
CASES = [case for family in FAMILIES.values() for case in family]
BY_NAME = {case.name: case for case in CASES}
