// The update rules' element formulas, each once (fastmto/ops/rules.py has them in words and says
// what the numbers are). Part of loops.h.
//
// A rule holds broadcast constants. update(s, g): u of gradient g with the moments s held fixed.
// advance(s, g): one step of s on g. States in the order of the rule's state_names. Where a quotient
// by a root is formed, numerator and eps are held doubled (over_root).

template <class S>
struct AdamRule {
  static constexpr int states = 2;
  using V = Pack<S>;
  V b1, b1c, b2, b2c, old_m, new_m, eps;

  // c1 m / (c2 sqrt(v) + eps) = (c1/c2) m / (sqrt(v) + eps/c2): all scales leave the loop.
  explicit AdamRule(const Numbers& c)
      : b1(broadcast(S(c.b1))),
        b1c(broadcast(S(c.d1))),
        b2(broadcast(S(c.b2))),
        b2c(broadcast(S(c.d2))),
        old_m(broadcast(S(2 * c.c1 / c.c2 * c.b1))),
        new_m(broadcast(S(2 * c.c1 / c.c2 * c.d1))),
        eps(broadcast(S(2 * c.eps / c.c2))) {}

  FASTMTO_INLINE V update(const V* s, V g) const {
    const V m = mul_add(new_m, g, old_m * s[0]);
    const V v = mul_add(b2c * g, g, kept_from_zero(b2 * s[1]));
    return over_root(m, v, eps);
  }

  FASTMTO_INLINE void advance(V* s, V g) const {
    s[0] = mul_add(b1c, g, b1 * s[0]);
    s[1] = mul_add(b2c * g, g, b2 * s[1]);
  }
};

template <class S>
struct AdaGradRule {
  static constexpr int states = 1;
  using V = Pack<S>;
  V eps;

  explicit AdaGradRule(const Numbers& c) : eps(broadcast(S(2 * c.eps))) {}

  FASTMTO_INLINE V update(const V* s, V g) const { 
    return over_root(g + g, mul_add(g, g, kept_from_zero(s[0])), eps);
  }

  FASTMTO_INLINE void advance(V* s, V g) const { s[0] = mul_add(g, g, s[0]); }
};

template <class S, bool momentum, bool centered>
struct RMSPropRule {
  static constexpr int states = 1 + momentum + centered;
  using V = Pack<S>;
  V b2, b2c, eps, mu;

  explicit RMSPropRule(const Numbers& c)
      : b2(broadcast(S(c.b2))),
        b2c(broadcast(S(c.d2))),
        eps(broadcast(S(2 * c.eps))),
        mu(broadcast(S(c.mu))) {}

  FASTMTO_INLINE V update(const V* s, V g) const {
    V v = mul_add(b2c * g, g, kept_from_zero(b2 * s[0]));
    if constexpr (centered) {
      const V q = mul_add(b2c, g, b2 * s[states - 1]);
      v = max(kept_from_zero(broadcast(S(0))), v - q * q);
    }
    const V u = over_root(g + g, v, eps);
    if constexpr (momentum) return mul_add(mu, s[1], u);
    return u;
  }

  FASTMTO_INLINE void advance(V* s, V g) const {
    if constexpr (momentum) s[1] = update(s, g);
    s[0] = mul_add(b2c * g, g, b2 * s[0]);
    if constexpr (centered) s[states - 1] = mul_add(b2c, g, b2 * s[states - 1]);
  }
};

template <int kind, class S>
struct RuleOf;
template <class S>
struct RuleOf<0, S> {
  using type = AdamRule<S>;
};
template <class S>
struct RuleOf<1, S> {
  using type = AdaGradRule<S>;
};
template <class S>
struct RuleOf<2, S> {
  using type = RMSPropRule<S, false, false>;
};
template <class S>
struct RuleOf<3, S> {
  using type = RMSPropRule<S, true, false>;
};
template <class S>
struct RuleOf<4, S> {
  using type = RMSPropRule<S, false, true>;
};
template <class S>
struct RuleOf<5, S> {
  using type = RMSPropRule<S, true, true>;
};
