"""Questions that only a picture answers: a generator of seeded sets, one family of questions a skill."""
