//! Sizes that can be computed with: what every reader of a configuration asks last.
//!
//! Invariant: after it, no product of two sizes overflows and every division has a divisor.

use super::{Architecture, AttentionSpec, NormSpec, PositionSpec};
use crate::error::{ModelError, Result};

/// A key and what is wrong with it.
type Fault = (&'static str, String);

/// No real model has a size beyond this.
const MOST: usize = 1 << 24;

impl Architecture {
    /// Refuses sizes that cannot be computed with: zero, not divisible, or beyond any real model.
    pub(crate) fn validate(self, file: &str) -> Result<Self> {
        let wrong = |key: &str, reason: String| ModelError::Config { file: file.to_owned(), key: key.to_owned(), reason };
        self.check().map_err(|(key, reason)| wrong(key, reason))?;
        Ok(self)
    }

    fn check(&self) -> std::result::Result<(), Fault> {
        let AttentionSpec { heads, kv_heads, head_dim, value_dim, .. } = self.attention;
        let mut sizes = vec![
            ("hidden_size", self.hidden_size),
            ("layers", self.layers),
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("embedding width", self.embedding.width),
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("value_dim", value_dim),
            ("intermediate_size", self.mlp.intermediate_size),
        ];
        if let Some(experts) = &self.experts {
            sizes.extend([("experts", experts.count), ("expert intermediate_size", experts.expert.intermediate_size)]);
            sizes.extend(experts.shared.map(|shared| ("shared expert intermediate_size", shared.mlp.intermediate_size)));
        }
        for (key, size) in sizes {
            if size == 0 || size > MOST {
                return Err((key, format!("is {size}, must be between 1 and {MOST}")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(("kv_heads", format!("{heads} query heads are not a multiple of {kv_heads} KV heads")));
        }
        if heads.saturating_mul(head_dim.max(value_dim)) > MOST {
            return Err(("head_dim", format!("{heads} heads of {head_dim} are wider than {MOST}")));
        }
        self.check_norms()?;
        self.check_experts()?;
        if let PositionSpec::Rope(rope) = &self.position {
            let rotated = self.attention.latent.map_or(head_dim, |latent| latent.rope_dim);
            rope.tables.iter().try_for_each(|table| table.validate(rotated))?;
        }
        Ok(())
    }

    fn check_norms(&self) -> std::result::Result<(), Fault> {
        let positive = |key, NormSpec { eps, .. }: NormSpec| {
            if eps.is_finite() && eps > 0.0 { Ok(()) } else { Err((key, format!("is {eps}, must be positive"))) }
        };
        positive("norm eps", self.norm)?;
        self.attention.qk_norm.map_or(Ok(()), |qk_norm| positive("query and key norm eps", qk_norm.norm))
    }

    fn check_experts(&self) -> std::result::Result<(), Fault> {
        let Some(experts) = &self.experts else { return Ok(()) };
        let (count, router) = (experts.count, experts.router);
        if router.per_token == 0 || router.per_token > count {
            return Err(("experts per token", format!("is {}, must be between 1 and {count}", router.per_token)));
        }
        let Some(groups) = router.groups else { return Ok(()) };
        if groups.count == 0 || !count.is_multiple_of(groups.count) {
            return Err(("expert groups", format!("{count} experts are not a multiple of {} groups", groups.count)));
        }
        let group_size = count / groups.count;
        if groups.kept == 0 || groups.kept > groups.count || groups.kept * group_size < router.per_token {
            return Err((
                "expert groups kept",
                format!("{} of {} hold fewer than {} experts", groups.kept, groups.count, router.per_token),
            ));
        }
        if groups.best_two && group_size < 2 {
            return Err(("expert groups", format!("of {group_size} have no two best")));
        }
        Ok(())
    }
}
