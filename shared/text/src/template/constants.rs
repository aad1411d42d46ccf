//! Constants of a template, which the engine computes while it compiles.
//!
//! Invariant: no template is compiled whose constants would be made larger than [`MAX_BYTES`].

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};

/// Most bytes that all computed constants of a template may have.
const MAX_BYTES: usize = 16 << 20;

/// The limit where a template's constants pass it.
pub(super) fn too_large(template: &Stmt<'_>) -> Option<usize> {
    let mut sum = Sum(0);
    sum.statement(template);
    (sum.0 > MAX_BYTES).then_some(MAX_BYTES)
}

struct Sum(usize);

impl Sum {
    fn statements(&mut self, statements: &[Stmt<'_>]) {
        statements.iter().for_each(|statement| self.statement(statement));
    }

    fn statement(&mut self, statement: &Stmt<'_>) {
        match statement {
            Stmt::Template(it) => self.statements(&it.children),
            Stmt::EmitExpr(it) => self.expression(&it.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
            Stmt::ForLoop(it) => {
                self.expression(&it.iter);
                self.optional(it.filter_expr.as_ref());
                self.expression(&it.target);
                self.statements(&it.body);
                self.statements(&it.else_body);
            }
            Stmt::IfCond(it) => {
                self.expression(&it.expr);
                self.statements(&it.true_body);
                self.statements(&it.false_body);
            }
            Stmt::WithBlock(it) => {
                for (target, value) in &it.assignments {
                    self.expression(target);
                    self.expression(value);
                }
                self.statements(&it.body);
            }
            Stmt::Set(it) => {
                self.expression(&it.target);
                self.expression(&it.expr);
            }
            Stmt::SetBlock(it) => {
                self.expression(&it.target);
                self.optional(it.filter.as_ref());
                self.statements(&it.body);
            }
            Stmt::AutoEscape(it) => {
                self.expression(&it.enabled);
                self.statements(&it.body);
            }
            Stmt::FilterBlock(it) => {
                self.expression(&it.filter);
                self.statements(&it.body);
            }
            Stmt::Block(it) => self.statements(&it.body),
            Stmt::Import(it) => self.expression(&it.expr),
            Stmt::FromImport(it) => self.expression(&it.expr),
            Stmt::Extends(it) => self.expression(&it.name),
            Stmt::Include(it) => self.expression(&it.name),
            Stmt::Macro(it) => {
                self.expressions(&it.defaults);
                self.statements(&it.body);
            }
            Stmt::CallBlock(it) => {
                self.expression(&it.call.expr);
                self.arguments(&it.call.args);
                self.expressions(&it.macro_decl.defaults);
                self.statements(&it.macro_decl.body);
            }
            Stmt::Do(it) => {
                self.expression(&it.call.expr);
                self.arguments(&it.call.args);
            }
        }
    }

    fn optional(&mut self, expression: Option<&Expr<'_>>) {
        expression.into_iter().for_each(|expression| self.expression(expression));
    }

    fn expressions(&mut self, expressions: &[Expr<'_>]) {
        expressions.iter().for_each(|expression| self.expression(expression));
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(value) | CallArg::Kwarg(_, value) | CallArg::PosSplat(value) | CallArg::KwargSplat(value) => {
                    self.expression(value)
                }
            }
        }
    }

    fn expression(&mut self, expression: &Expr<'_>) {
        match expression {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(it) => {
                self.expression(&it.expr);
                for part in [&it.start, &it.stop, &it.step] {
                    self.optional(part.as_ref());
                }
            }
            Expr::UnaryOp(it) => self.expression(&it.expr),
            Expr::BinOp(it) => match computed_bytes(expression) {
                Some(bytes) => self.0 = self.0.saturating_add(bytes),
                None => {
                    self.expression(&it.left);
                    self.expression(&it.right);
                }
            },
            Expr::Compare(it) => {
                self.expression(&it.expr);
                it.ops.iter().for_each(|operation| self.expression(&operation.expr));
            }
            Expr::IfExpr(it) => {
                self.expression(&it.test_expr);
                self.expression(&it.true_expr);
                self.optional(it.false_expr.as_ref());
            }
            Expr::Filter(it) => {
                self.optional(it.expr.as_ref());
                self.arguments(&it.args);
            }
            Expr::Test(it) => {
                self.expression(&it.expr);
                self.arguments(&it.args);
            }
            Expr::GetAttr(it) => self.expression(&it.expr),
            Expr::GetItem(it) => {
                self.expression(&it.expr);
                self.expression(&it.subscript_expr);
            }
            Expr::Call(it) => {
                self.expression(&it.expr);
                self.arguments(&it.args);
            }
            Expr::List(it) => self.expressions(&it.items),
            Expr::Tuple(it) => self.expressions(&it.items),
            Expr::Map(it) => {
                self.expressions(&it.keys);
                self.expressions(&it.values);
            }
        }
    }
}

/// Bytes that computing an expression of constants makes; `None` where it has a variable in it.
fn computed_bytes(expression: &Expr<'_>) -> Option<usize> {
    let all = |items: &[Expr<'_>]| {
        items.iter().try_fold(0, |sum: usize, item| Some(sum.saturating_add(24).saturating_add(computed_bytes(item)?)))
    };
    match expression {
        Expr::Const(it) => Some(it.value.as_str().map_or(0, str::len)),
        Expr::UnaryOp(it) => computed_bytes(&it.expr),
        Expr::List(it) => all(&it.items),
        Expr::Tuple(it) => all(&it.items),
        Expr::Map(it) => Some(all(&it.keys)?.saturating_add(all(&it.values)?)),
        Expr::Compare(it) => {
            it.ops.iter().try_fold(computed_bytes(&it.expr)?, |sum, operation| Some(sum.saturating_add(computed_bytes(&operation.expr)?)))
        }
        Expr::BinOp(it) => {
            let (left, right) = (computed_bytes(&it.left)?, computed_bytes(&it.right)?);
            Some(match it.op {
                BinOpKind::Mul if left > 0 && right == 0 => left.saturating_mul(times(&it.right)),
                BinOpKind::Mul if left == 0 && right > 0 => right.saturating_mul(times(&it.left)),
                // A number as text has at most 40 characters.
                BinOpKind::Concat => left.saturating_add(right).saturating_add(80),
                _ => left.saturating_add(right),
            })
        }
        _ => None,
    }
}

/// The number that something is repeated by. What has no bytes is numbers only: cheap to compute.
fn times(expression: &Expr<'_>) -> usize {
    expression.as_const().and_then(|value| value.as_usize()).unwrap_or_default()
}
