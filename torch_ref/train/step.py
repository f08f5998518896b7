"""Training the VAE and its discriminator, a batch at a time. Clips are B C T H W; the noise is B z t h w."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_ref.families.pyramid import CausalVideoVAE
from torch_ref.metrics.lpips import LPIPS
from torch_ref.train import losses
from torch_ref.train.optimizer import Optimizer, global_norm, move_average
from torch_ref.train.recipe import Recipe

LECAM_DECAY = 0.99
Terms = dict[str, Tensor]


class Trainer:
    """A run: the VAE that it changes, the moving average of it, and a discriminator where there is a GAN."""

    def __init__(
        self,
        vae: CausalVideoVAE,
        recipe: Recipe,
        lpips: LPIPS | None = None,
        discriminator: nn.Module | None = None,
    ):
        self.recipe, self.lpips = recipe, lpips
        self.vae = vae.train()
        self.average = copy.deepcopy(vae).eval().requires_grad_(False)
        self.optimizer = Optimizer(vae, recipe)
        self.discriminator = discriminator
        self.discriminator_optimizer = None if discriminator is None else Optimizer(discriminator, recipe)
        self.usual_logits = (self.optimizer.parameters[0].new_zeros(()),) * 2
        self.skipped = 0

    def step(self, frames: Tensor, noise: Tensor, with_gan: bool) -> dict[str, float]:
        """Takes a step on pixels, uint8 or in [-1, 1], unless something is not finite; gives what it has measured."""
        video = (frames.to(noise) - 127.5) / 127.5 if frames.dtype == torch.uint8 else frames.to(noise)
        posterior = self.vae.encode(video)
        again, kl = self.vae.decode(posterior.sample(noise)), posterior.kl()
        reconstruction, terms = self.reconstruction_loss(again, video)
        total = reconstruction + self.recipe.kl * kl
        terms |= {"kl": kl, "total": total}
        loss, judged = total, []
        if with_gan:
            gan, weight = self.gan_loss(again, reconstruction)
            loss = total + weight * gan
            judged, more = self.discriminator_gradients(again.detach(), video)
            terms |= {"gan": gan, "gan_weight": weight, **more}
        gradients = torch.autograd.grad(loss, self.optimizer.parameters)
        terms |= {"gradient_norm": global_norm(gradients)}
        rate = self.optimizer.rate
        if all(term.isfinite() for term in terms.values()):
            self.change(gradients, judged, terms)
            self.skipped = 0
        else:
            self.skipped += 1
        return {name: term.item() for name, term in terms.items()} | {"learning_rate": rate, "skipped": self.skipped}

    def reconstruction_loss(self, again: Tensor, video: Tensor) -> tuple[Tensor, Terms]:
        terms = {"mse": losses.mse(again, video), "l1": losses.l1(again, video)}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(again, video).mean()
        return torch.stack([getattr(self.recipe, name) * term for name, term in terms.items()]).sum(), terms

    def gan_loss(self, again: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's loss against the discriminator, and its weight."""
        assert self.discriminator is not None
        gan = losses.hinge_generator(self.discriminator(again))
        last_kernel = self.vae.decoder.conv_out.conv.weight
        return gan, self.recipe.gan * losses.adaptive_weight(reconstruction, gan, last_kernel)

    def discriminator_gradients(self, again: Tensor, video: Tensor) -> tuple[Sequence[Tensor], Terms]:
        """The gradients of the discriminator's own loss, and the terms of it."""
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        real, fake = self.discriminator(video), self.discriminator(again)
        loss = hinge = losses.hinge_discriminator(real, fake)
        terms = {"discriminator": hinge, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.recipe.regularizer == "r1":
            terms["r1"] = losses.r1(self.discriminator, video.clone().requires_grad_())
        elif self.recipe.regularizer == "lecam":
            terms["lecam"] = losses.lecam(real, fake, *self.usual_logits)
        if self.recipe.regularizer != "none":
            loss = hinge + self.recipe.regularizer_weight * terms[self.recipe.regularizer]
        gradients = torch.autograd.grad(loss, self.discriminator_optimizer.parameters)
        return gradients, terms | {"discriminator_gradient_norm": global_norm(gradients)}

    def change(self, gradients: Sequence[Tensor], judged: Sequence[Tensor], terms: Terms) -> None:
        """Changes the VAE, its average, and where it has judged the discriminator."""
        if self.optimizer.step(gradients):
            now = self.optimizer.updates
            move_average(self.average, self.vae, min(self.recipe.ema, (1 + now) / (10 + now)))
        if judged and self.discriminator_optimizer is not None:
            self.discriminator_optimizer.step(judged)
            real, fake = self.usual_logits
            self.usual_logits = moved(real, terms["logits_real"]), moved(fake, terms["logits_fake"])


def moved(usual: Tensor, logits: Tensor) -> Tensor:
    return LECAM_DECAY * usual + (1 - LECAM_DECAY) * logits.detach()
