//! `forgectl eval`: quality of models.

mod kld;
mod perplexity;
mod protocol;

use crate::cli::measure::{EvalArgs, EvalCommand};
use crate::failure::Result;

/// Runs a command of `eval`.
///
/// # Errors
/// Models or texts that cannot be used or compared.
pub fn eval(args: &EvalArgs) -> Result<()> {
    match &args.command {
        EvalCommand::Perplexity(args) => perplexity::perplexity(args),
        EvalCommand::Kld(args) => kld::kld(args),
    }
}

/// A figure and its error, as people write them.
fn with_error(estimate: forge_eval::Estimate) -> String {
    format!("{} ± {}", number(estimate.value), number(estimate.standard_error))
}

/// Five significant digits; very small and very large ones with an exponent.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e7).contains(&size) => format!("{value:.4e}"),
        size => format!("{value:.*}", (4 - size.log10().floor() as i32).clamp(0, 7) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_five_digits() {
        for (value, text) in [(0.0, "0"), (12.345678, "12.346"), (0.0123456, "0.012346"), (0.00001234, "1.2340e-5"), (204567.8, "204568")] {
            assert_eq!(number(value), text);
        }
        assert_eq!(number(-1.5), "-1.5000");
    }
}
