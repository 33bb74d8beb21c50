// A ranking with ties, independent of the page: `places` from best to worst, each a list of tied keys.

export class Order {
  /** `places` is modified in place, so that the caller can read it at any time. */
  constructor(places) {
    this.places = places;
  }

  keys() {
    return this.places.flat();
  }

  placeOf(key) {
    return this.places.findIndex((place) => place.includes(key));
  }

  /** Return the rank of each key: 1 is the best, tied keys have equal ranks. */
  ranks(keys) {
    return keys.map((key) => this.placeOf(key) + 1);
  }

  tied(key) {
    return this.places[this.placeOf(key)].length > 1;
  }

  /** Move a key one place up (-1) or down (1): out of a tie, or past its neighbour. Return whether it moved. */
  step(key, direction) {
    const at = this.placeOf(key);
    if (this.tied(key)) {
      this.#take(key);
      this.places.splice(direction < 0 ? at : at + 1, 0, [key]);
      return true;
    }
    const other = at + direction;
    if (other < 0 || other >= this.places.length) return false;
    [this.places[at], this.places[other]] = [this.places[other], this.places[at]];
    return true;
  }

  /** Tie a key with the place above it (the first one with the place below), or end its tie. */
  tie(key) {
    if (this.tied(key)) return this.step(key, 1);
    const at = this.placeOf(key);
    const other = at === 0 ? 1 : at - 1;
    this.places[other].push(key);
    this.places.splice(at, 1);
    return true;
  }

  /** Put a key before, after or onto the place that holds another one. */
  put(key, target, where) {
    if (key === target) return false;
    const before = JSON.stringify(this.places);
    this.#take(key);
    const at = this.placeOf(target);
    if (where === "on") this.places[at].push(key);
    else this.places.splice(where === "before" ? at : at + 1, 0, [key]);
    return JSON.stringify(this.places) !== before;
  }

  #take(key) {
    const at = this.placeOf(key);
    this.places[at] = this.places[at].filter((other) => other !== key);
    if (this.places[at].length === 0) this.places.splice(at, 1);
  }
}
