//! Sizes that can be computed with: what every reader of a configuration asks last.
//!
//! Invariant: after it, no product of two sizes overflows and every division has a divisor.

use forge_kernels::NormKind;

use super::families::row::{Keys, KvHeads};
use super::families::{self, Family};
use super::{Architecture, AttentionSpec, BlockOrder, NormSpec, PositionSpec, QkNormOver, QkNormSpec};
use crate::error::{ModelError, Result};

/// A key and what is wrong with it.
type Fault = (&'static str, String);

/// No real model has a size beyond this.
const MOST: usize = 1 << 24;
/// No real layer has as many experts: the largest published mixtures have hundreds.
const MOST_EXPERTS: usize = 4096;

impl Architecture {
    /// Refuses sizes that cannot be computed with: zero, not divisible, or beyond any real model.
    pub(crate) fn validate(self, file: &str) -> Result<Self> {
        let wrong = |key, reason| ModelError::Config { file: file.to_owned(), key: self.written(file, key).to_owned(), reason };
        self.check().map_err(|(key, reason)| wrong(key, reason))?;
        Ok(self)
    }

    /// What a file calls a size.
    fn written<'k>(&self, file: &str, key: &'k str) -> &'k str {
        const GGUF: [(&str, &str); 8] = [
            ("hidden_size", "embedding_length"),
            ("layers", "block_count"),
            ("heads", "attention.head_count"),
            ("kv_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("value_dim", "attention.value_length"),
            ("intermediate_size", "feed_forward_length"),
            ("experts", "expert_count"),
        ];
        let first = |keys: Keys| keys.first().copied();
        let name = match (file, families::by_name(self.family)) {
            ("GGUF metadata", _) => GGUF.iter().find(|(size, _)| *size == key).map(|&(_, name)| name),
            ("config.json", Some(Family { sizes, experts, .. })) => match key {
                "hidden_size" => first(sizes.hidden_size.keys),
                "layers" => first(sizes.layers.keys),
                "vocab_size" => first(sizes.vocab_size.keys),
                "context_length" => first(sizes.context_length.keys),
                "heads" => first(sizes.heads.keys),
                "kv_heads" => match &sizes.kv_heads {
                    KvHeads::Key(size) | KvHeads::MultiQuery(size) => first(size.keys),
                },
                "head_dim" => first(sizes.head_dim.keys),
                "intermediate_size" => first(sizes.intermediate_size.keys),
                "experts" => experts.as_ref().and_then(|experts| first(experts.count.keys)),
                _ => None,
            },
            _ => None,
        };
        name.unwrap_or(key)
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
            sizes.push(("expert intermediate_size", experts.expert.intermediate_size));
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
        self.check_factors()?;
        self.check_block()?;
        self.check_layers()?;
        self.check_latent()?;
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

    /// Factors leave something of what they scale, limits bound something. Keys are named as GGUF has them.
    fn check_factors(&self) -> std::result::Result<(), Fault> {
        let Architecture { attention, block, embedding, experts, head, .. } = self;
        let router_scale = experts.as_ref().map_or(1.0, |experts| experts.router.scale);
        for (key, scale) in [
            ("attention.scale", attention.scale),
            ("embedding_scale", embedding.scale),
            ("residual_scale", block.residual_scale),
            ("logit_scale", head.scale),
            ("expert_weights_scale", router_scale),
        ] {
            if !scale.is_finite() || scale == 0.0 {
                return Err((key, format!("is {scale}, must be a number other than 0")));
            }
        }
        for (key, limit) in [
            ("attention.clamp_kqv", attention.clip),
            ("attn_logit_softcapping", attention.softcap),
            ("final_logit_softcapping", head.softcap),
        ] {
            if let Some(limit) = limit
                && !(limit.is_finite() && limit > 0.0)
            {
                return Err((key, format!("is {limit}, must be positive")));
            }
        }
        match &self.position {
            PositionSpec::Alibi(alibi) => {
                let slopes = alibi.slopes.iter().chain([&alibi.factor]);
                match slopes.into_iter().find(|slope| !(slope.is_finite() && **slope > 0.0)) {
                    Some(slope) => Err(("attention.max_alibi_bias", format!("makes a slope of {slope}, must be positive"))),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn check_block(&self) -> std::result::Result<(), Fault> {
        let block = self.block;
        let wrong = |reason: &str| Err(("block", reason.to_owned()));
        match block.order {
            BlockOrder::Parallel if !block.attention_pre_norm => wrong("attention and MLP in parallel need a norm before them"),
            BlockOrder::Parallel if block.attention_post_norm || block.mlp_post_norm => {
                wrong("attention and MLP in parallel have no norms after them")
            }
            BlockOrder::NormOfSum if block.attention_pre_norm || block.mlp_pre_norm => wrong("norms of sums come after their parts"),
            _ => Ok(()),
        }?;
        match self.attention.qk_norm {
            Some(QkNormSpec { over: QkNormOver::Full, norm }) if norm.kind != NormKind::Rms || !norm.weight || norm.bias => {
                Err(("query and key norm", "over full width is an RMS norm with a weight".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Lists of layers and heads are as long as there are layers and heads.
    fn check_layers(&self) -> std::result::Result<(), Fault> {
        let as_many = |key: &'static str, length: usize, expected: usize| {
            if length == expected { Ok(()) } else { Err((key, format!("has {length} entries, must have {expected}"))) }
        };
        as_many("windows", self.attention.windows.len(), self.layers)?;
        if let Some(experts) = &self.experts {
            as_many("layers with experts", experts.layers.len(), self.layers)?;
        }
        match &self.position {
            PositionSpec::Rope(rope) => {
                as_many("rotary tables", rope.of_layer.len(), self.layers)?;
                match rope.of_layer.iter().flatten().find(|&&table| table >= rope.tables.len()) {
                    Some(table) => Err(("rotary tables", format!("are {}, a layer has number {table}", rope.tables.len()))),
                    None => Ok(()),
                }
            }
            PositionSpec::Alibi(alibi) => as_many("alibi slopes", alibi.slopes.len(), self.attention.heads),
            PositionSpec::Learned { .. } => Ok(()),
        }
    }

    fn check_latent(&self) -> std::result::Result<(), Fault> {
        let AttentionSpec { heads, kv_heads, head_dim, latent, .. } = self.attention;
        let Some(latent) = latent else { return Ok(()) };
        for (key, size) in
            [("kv_lora_rank", latent.kv_rank), ("q_lora_rank", latent.query_rank.unwrap_or(1)), ("qk_rope_head_dim", latent.rope_dim)]
        {
            if size == 0 || size > MOST {
                return Err((key, format!("is {size}, must be between 1 and {MOST}")));
            }
        }
        if latent.plain_dim == 0 || latent.plain_dim.saturating_add(latent.rope_dim) != head_dim {
            let reason = format!("is {}, with {} rotated columns a head of {head_dim} needs another", latent.plain_dim, latent.rope_dim);
            return Err(("qk_nope_head_dim", reason));
        }
        if heads != kv_heads {
            return Err(("kv_heads", format!("are {kv_heads}, latent attention has as many as its {heads} query heads")));
        }
        Ok(())
    }

    fn check_experts(&self) -> std::result::Result<(), Fault> {
        let Some(experts) = &self.experts else { return Ok(()) };
        let (count, router) = (experts.count, experts.router);
        if count == 0 || count > MOST_EXPERTS {
            return Err(("experts", format!("is {count}, must be between 1 and {MOST_EXPERTS}")));
        }
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
