//! The feed-forward part of a layer: an MLP, or a mixture of experts.
//!
//! Where ranks hold different experts, each sees all tokens (what attention gives is whole on every one of them), takes
//! those that chose its own, adds what they give in the tree over expert indices, and ranks add their subtrees. So no
//! expert has a capacity, and no token is ever dropped.
//!
//! Invariant: only the chosen experts' weights are touched; an expert's output is complete (summed over tensor ranks, with
//! its bias) before it is weighted; the shared expert comes last.

use forge_kernels::{Backend, ExpertChoices, ExpertEntry, GroupProduct, Product, RowGroup};

use super::choices::Choices;
use super::forward::{Pass, product};
use super::loaded::{ExpertsWeights, FeedForward, Linear, MlpWeights, SplitMlp};
use super::workspace::{ExpertsBuffers, MlpBuffers, Parts, SharedBuffers};
use crate::arch::{ExpertsSpec, MlpSpec};
use crate::error::Result;
use crate::routing::{route, sigmoid};

impl<B: Backend> Pass<'_, B> {
    /// delta = the layer's feed-forward part of the input, summed over ranks, with its bias.
    pub(super) fn feed_forward(
        &self,
        weights: &FeedForward<B>,
        input: &B::Buffer,
        parts: &mut Parts<B::Buffer>,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        match (weights, &self.architecture.experts, &mut parts.experts) {
            (FeedForward::Experts(weights), Some(spec), Some(buffers)) => self.experts(weights, spec, input, buffers, delta),
            (FeedForward::Dense(weights), ..) => self.split_mlp(weights, &self.architecture.mlp, input, parts.mlp.as_mut(), delta),
            (FeedForward::Experts(_), ..) => unreachable!("layers, specification and buffers come from one architecture"),
        }
    }

    /// An MLP that ranks share.
    fn split_mlp(
        &self,
        weights: &SplitMlp<B>,
        spec: &MlpSpec,
        input: &B::Buffer,
        buffers: Option<&mut MlpBuffers<B::Buffer>>,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        match (&weights.mlp, buffers) {
            (Some(mlp), Some(buffers)) => self.mlp(mlp, spec, input, buffers, delta)?,
            _ => self.fill_neutral(delta, self.rows())?,
        }
        self.complete(delta, weights.bias.as_ref())
    }

    /// delta = down(activation(gate(x)) · up(x)), or down(activation(up(x))): this rank's part of the sum.
    fn mlp(
        &self,
        weights: &MlpWeights<B>,
        spec: &MlpSpec,
        input: &B::Buffer,
        buffers: &mut MlpBuffers<B::Buffer>,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        let (backend, rows) = (self.backend, self.rows());
        match (&weights.gate, &mut buffers.gate) {
            (Some(gate_weights), Some(gate)) => {
                backend.linear(input, rows, &mut [product(gate_weights, gate), product(&weights.up, &mut buffers.up)])?;
            }
            _ => backend.linear(input, rows, &mut [product(&weights.up, &mut buffers.up)])?,
        }
        let inner = self.activate(spec, buffers, rows)?;
        Ok(backend.linear(inner, rows, &mut [Product { weight: &weights.down, bias: None, out: delta }])?)
    }

    /// activation(gate) · up, or activation(up).
    fn activate<'b>(&self, spec: &MlpSpec, buffers: &'b mut MlpBuffers<B::Buffer>, rows: usize) -> Result<&'b B::Buffer> {
        match &mut buffers.gate {
            Some(gate) => {
                self.backend.activate(gate, rows, Some(&buffers.up), spec.activation)?;
                Ok(gate)
            }
            None => {
                self.backend.activate(&mut buffers.up, rows, None, spec.activation)?;
                Ok(&buffers.up)
            }
        }
    }

    /// delta = Σ weight · expert(x) over the chosen experts, plus the shared one.
    fn experts(
        &self,
        weights: &ExpertsWeights<B>,
        spec: &ExpertsSpec,
        input: &B::Buffer,
        buffers: &mut ExpertsBuffers<B::Buffer>,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        let ExpertsBuffers { router, pairs, inner, shared, subtree } = buffers;
        let choices = self.choose(weights, spec, input, router)?;
        let pair_rows = choices.tokens().len();
        // All tensor ranks of the same experts have the same pairs: where there are none, none of them waits for another.
        if pair_rows > 0 {
            self.backend.gather_rows(input, choices.tokens(), pairs)?;
            match (&weights.experts, inner) {
                (Some(experts), Some(inner)) => self.expert_mlps(experts, &spec.expert, &choices, inner, pairs)?,
                _ => self.fill_neutral(pairs, pair_rows)?,
            }
            self.groups.tensor.all_reduce(self.backend, pairs, pair_rows)?;
            if let Some(biases) = &weights.biases {
                self.backend.embed_add(biases, choices.experts(), pairs)?;
            }
        }
        let shared_weights = self.shared_expert(weights, spec, input, shared.as_mut())?;
        let shared_weights = shared_weights.as_deref();
        let shared = shared.as_ref().map(|shared| &shared.out);
        let chosen = ExpertChoices { leaves: spec.count, starts: choices.starts(), entries: choices.entries(), shared_weights: None };
        match subtree {
            None => Ok(self.backend.combine_experts(pairs, shared, ExpertChoices { shared_weights, ..chosen }, delta)?),
            Some(subtree) => {
                self.backend.combine_experts(pairs, None, chosen, subtree)?;
                self.groups.expert.all_reduce(self.backend, subtree, self.rows())?;
                self.add_shared(subtree, shared, shared_weights, delta)
            }
        }
    }

    /// delta = the complete sum over experts, plus the shared one: the tree's last addition.
    fn add_shared(&self, sum: &B::Buffer, shared: Option<&B::Buffer>, shared_weights: Option<&[f32]>, delta: &mut B::Buffer) -> Result<()> {
        let rows = self.rows() as u32;
        let starts: Vec<u32> = (0..=rows).collect();
        let entries: Vec<ExpertEntry> = (0..rows).map(|row| ExpertEntry { expert: 0, row, weight: 1.0 }).collect();
        let whole = ExpertChoices { leaves: 1, starts: &starts, entries: &entries, shared_weights };
        Ok(self.backend.combine_experts(sum, shared, whole, delta)?)
    }

    /// Which experts every row goes through. All ranks have the same input, so all choose the same.
    fn choose(&self, weights: &ExpertsWeights<B>, spec: &ExpertsSpec, input: &B::Buffer, router: &mut B::Buffer) -> Result<Choices> {
        let rows = self.rows();
        self.backend.linear(input, rows, &mut [product(&weights.router, router)])?;
        let mut logits = vec![0.0; rows * spec.count];
        self.backend.read_rows(router, 0..rows, &mut logits)?;
        let mut chosen = Vec::with_capacity(rows * spec.router.per_token);
        for logits in logits.chunks(spec.count) {
            route(&spec.router, logits, weights.correction.as_deref(), &mut chosen);
        }
        Ok(Choices::new(&chosen, rows, &self.layout.experts))
    }

    /// pairs = expert(pairs) of every run of rows, this rank's part of the sum.
    fn expert_mlps(
        &self,
        experts: &[MlpWeights<B>],
        spec: &MlpSpec,
        choices: &Choices,
        inner: &mut MlpBuffers<B::Buffer>,
        pairs: &mut B::Buffer,
    ) -> Result<()> {
        let group = |of: &dyn Fn(&'_ MlpWeights<B>) -> Option<&'_ Linear<B>>| -> Vec<RowGroup<'_, B>> {
            let runs = choices.runs().iter();
            runs.filter_map(|run| {
                let linear = of(&experts[run.expert])?;
                Some(RowGroup { rows: run.rows.clone(), weight: &linear.weight, bias: linear.bias.as_ref() })
            })
            .collect()
        };
        let MlpBuffers { gate, up } = inner;
        let mut products = Vec::with_capacity(2);
        products.extend(gate.as_mut().map(|out| GroupProduct { groups: group(&|expert| expert.gate.as_ref()), out }));
        products.push(GroupProduct { groups: group(&|expert| Some(&expert.up)), out: up });
        self.backend.linear_groups(pairs, &mut products)?;
        let activated = self.activate(spec, inner, choices.tokens().len())?;
        let down = |run: &super::choices::Run| RowGroup { rows: run.rows.clone(), weight: &experts[run.expert].down, bias: None };
        let groups = choices.runs().iter().map(down).collect();
        Ok(self.backend.linear_groups(activated, &mut [GroupProduct { groups, out: pairs }])?)
    }

    /// The shared expert's output, complete, and the factor on it for every row where it is gated.
    fn shared_expert(
        &self,
        weights: &ExpertsWeights<B>,
        spec: &ExpertsSpec,
        input: &B::Buffer,
        buffers: Option<&mut SharedBuffers<B::Buffer>>,
    ) -> Result<Option<Vec<f32>>> {
        let (Some(shared), Some(spec), Some(buffers)) = (&weights.shared, &spec.shared, buffers) else { return Ok(None) };
        self.split_mlp(shared, &spec.mlp, input, buffers.inner.as_mut(), &mut buffers.out)?;
        let (Some(weight), Some(gate)) = (&weights.shared_gate, &mut buffers.gate) else { return Ok(None) };
        self.backend.linear(input, self.rows(), &mut [Product { weight, bias: None, out: gate }])?;
        let mut factors = vec![0.0; self.rows()];
        self.backend.read_rows(gate, 0..self.rows(), &mut factors)?;
        factors.iter_mut().for_each(|factor| *factor = sigmoid(*factor));
        Ok(Some(factors))
    }
}
